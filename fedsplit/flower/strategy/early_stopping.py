"""Early stopping: ends training when held-out loss has not improved for long enough."""

import logging
import math

from fedsplit.telemetry.round import RoundStats

log = logging.getLogger(__name__)


class EarlyStopping:
    """The best held-out loss of a run, and how many evaluations ago it was measured.

    Args:
        patience: The number of evaluations without improvement that ends training; 0 for never.
    """

    def __init__(self, patience: int) -> None:
        self.best = math.inf
        self.worse = 0
        self._patience = patience

    def may_stop(self) -> bool:
        """Return whether the next evaluation can end training."""
        return 0 < self._patience <= self.worse + 1

    def stops(self, stats: RoundStats) -> bool:
        """Record a round, and return whether training ends with it."""
        # A round without an evaluation has NaN.
        if math.isnan(stats.eval_loss):
            return False
        if stats.eval_loss < self.best:
            self.best, self.worse = stats.eval_loss, 0
        else:
            self.worse += 1
        if not self._patience or self.worse < self._patience:
            return False
        log.info(
            "Training stops after round %s: the best held-out loss, %.4f, is %s evaluations "
            "old (train.patience)",
            stats.round,
            self.best,
            self.worse,
        )
        return True
