"""A rank other than 0: it replays the calls that rank 0 sends, until rank 0 ends."""

import logging
import signal

from fedsplit.model.stage import TrunkPart
from fedsplit.ranks.group import Ranks
from fedsplit.spec import RunSpec
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.trunk.shards import group_of
from fedsplit.trunk.training import Training
from fedsplit.trunk.update import TrunkUpdate


def replay(
    ranks: Ranks,
    trunk: TrunkPart,
    run: RunSpec,
    update: type[TrunkUpdate],
    training: type[Training] = Training,
) -> None:
    """Compute with rank 0 until it ends.

    Args:
        ranks: The ranks; this one is not the first.
        trunk: This rank's shard of the trunk.
        run: The run of rank 0.
        update: As in `TrunkEngine`; that of rank 0.
        training: As in `TrunkEngine`; that of rank 0.
    """
    if not ranks.is_child:
        # torchrun ends all of its processes at once, but rank 0 has calls to finish first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    # Rank 0 logs the same.
    logging.disable(logging.WARNING)
    is_first = True
    while True:
        engine = TrunkEngine(trunk, run, update=update, training=training, channel=ranks)
        if is_first:
            ranks.begin(group_of(trunk))
            is_first = False
        if not engine.replay():
            return
