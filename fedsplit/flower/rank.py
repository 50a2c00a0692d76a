"""A further rank of a run's trunk: `python -m fedsplit.flower.rank`, started by the ServerApp.

Its place among the ranks is in the environment, and rank 0 sends it the run.
"""

import json
import sys
from collections.abc import Sequence

from transformers import CONFIG_MAPPING, PretrainedConfig

from fedsplit.config import from_yaml, resolve, to_yaml
from fedsplit.console import quiet_libraries
from fedsplit.model.describe import trunk_of
from fedsplit.ranks.group import ranks_of
from fedsplit.ranks.replay import replay
from fedsplit.spec import RunSpec
from fedsplit.trunk.turns import Order


def command_of(run: RunSpec) -> Sequence[str]:
    """Return the command of a further rank of the run's trunk."""
    return [sys.executable, "-m", __name__, str(run.launch.trunk_tp)]


def build_order(run: RunSpec, config: PretrainedConfig) -> Order:
    """Return what the other ranks build their shards from.

    Args:
        run: The run.
        config: The unsplit model's config.
    """
    fields = json.loads(config.to_json_string(use_diff=False))
    return Order("build", (to_yaml(run), config.model_type, fields))


def main() -> None:
    """Compute with rank 0 until it ends."""
    quiet_libraries()
    with ranks_of(int(sys.argv[1]), []) as ranks:
        assert ranks, "rank 0 starts this program for several ranks"
        order = ranks.receive()
        assert isinstance(order, Order), "rank 0 sends the run first"
        text, model_type, fields = order.arguments
        run, config = from_yaml(text), CONFIG_MAPPING[model_type].from_dict(fields)
        trunk = trunk_of(run, config, ranks.device, ranks=ranks.size)
        replay(ranks, trunk, run, resolve(run.strategy.target).update)


if __name__ == "__main__":
    main()
