"""A further rank of a trunk server of a run: `python -m fedsplit.flower.rank`, started by rank 0.

Its place among the ranks is in the environment, and rank 0 sends it the run.
"""

import json
import sys
from collections.abc import Sequence

from transformers import CONFIG_MAPPING, PretrainedConfig

from fedsplit.config import from_yaml, resolve, to_yaml
from fedsplit.console import quiet_libraries
from fedsplit.model.describe import trunk_of
from fedsplit.model.stage import TrunkPart
from fedsplit.ranks.group import Ranks, ranks_of
from fedsplit.ranks.replay import replay
from fedsplit.spec import RunSpec
from fedsplit.trunk.follower_training import FollowerTraining
from fedsplit.trunk.training import Training
from fedsplit.trunk.turns import Order


def command_of(run: RunSpec) -> Sequence[str]:
    """Return the command of a further rank of the run's trunk."""
    return [sys.executable, "-m", __name__, str(run.launch.trunk_tp)]


def shard_on(
    ranks: Ranks, run: RunSpec, config: PretrainedConfig, *, follows: bool = False
) -> TrunkPart:
    """Have the other ranks build their shards of a trunk; return that of rank 0.

    Args:
        ranks: The ranks; this one is the first.
        run: The run.
        config: The unsplit model's config.
        follows: Whether these are the ranks of a follower.

    Raises:
        UnsupportedModel: The family cannot be cut over ranks.
    """
    fields = json.loads(config.to_json_string(use_diff=False))
    ranks.send(Order("build", (to_yaml(run), config.model_type, fields, follows)))
    return trunk_of(run, config, ranks.device, ranks=ranks.size)


def main() -> None:
    """Compute with rank 0 until it ends."""
    quiet_libraries()
    with ranks_of(int(sys.argv[1]), []) as ranks:
        assert ranks, "rank 0 starts this program for several ranks"
        order = ranks.receive()
        assert isinstance(order, Order), "rank 0 sends the run first"
        text, model_type, fields, follows = order.arguments
        run, config = from_yaml(text), CONFIG_MAPPING[model_type].from_dict(fields)
        trunk = trunk_of(run, config, ranks.device, ranks=ranks.size)
        training = FollowerTraining if follows else Training
        replay(ranks, trunk, run, resolve(run.strategy.target).update, training)


if __name__ == "__main__":
    main()
