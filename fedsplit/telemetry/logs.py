"""The log as a sink: a line for each round."""

import logging

from fedsplit.telemetry.events import Event
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink


class RoundLog(Sink):
    """Logs the printed line of every round.

    Args:
        log: The logger.
    """

    needs_details = False

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def on_event(self, event: Event) -> None:
        """Log a round."""
        if isinstance(event, RoundStats):
            self._log.info("%s", event.line)
