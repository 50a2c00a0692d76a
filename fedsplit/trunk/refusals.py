"""The refusals of a trunk in training: counts those of each client, except overflows of float16."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedsplit.errors import GradExploded, NonFinite, ProtocolError
from fedsplit.spec import RunSpec
from fedsplit.trunk.norm_guard import Quarantine

log = logging.getLogger(__name__)

_FLOAT16 = "float16"


class Refusals:
    """Counts the calls of clients that are refused, and excludes a client after some in a row.

    An overflow of float16 is no fault: its client lowers the loss scale. Float16 is a precision of
    the run, or that of the autocast which a forward of the session has named.

    Args:
        run: The run.
        quarantine: The counts and quarantines of clients.
        clock: Seconds that do not run backwards.
        exclude: Called with a client whose quarantine begins.
    """

    def __init__(
        self,
        run: RunSpec,
        quarantine: Quarantine,
        clock: Callable[[], float],
        exclude: Callable[[str], None],
    ) -> None:
        self._quarantine = quarantine
        self._clock = clock
        self._exclude = exclude
        # With `auto`, a client chooses for a device that the trunk does not know.
        self._run_overflows = run.model.autocast in (_FLOAT16, "auto") or (
            run.model.dtype == _FLOAT16
        )
        self._in_float16: set[str] = set()

    @contextmanager
    def counted(self, client: str, session: str, autocast: str = "") -> Iterator[None]:
        """A context that counts the refusal of a call; the last ones exclude its client.

        Args:
            client: The client.
            session: Its session.
            autocast: The precision that the call names, if it is a forward.

        Raises:
            Quarantined: The client is in quarantine already.
        """
        now = self._clock()
        self._quarantine.require_free(client, now)
        if autocast == _FLOAT16:
            self._in_float16.add(session)
        try:
            yield
        except (NonFinite, GradExploded, ProtocolError) as refusal:
            log.warning("a contribution of %s was refused: %s", client, refusal)
            may_overflow = self._run_overflows or session in self._in_float16
            is_overflow = isinstance(refusal, NonFinite) and may_overflow
            if seconds := self._quarantine.refuse(client, now, is_overflow=is_overflow):
                log.warning("%s is in quarantine for %.0f s", client, seconds)
                self._exclude(client)
            raise

    def forget(self, session: str) -> None:
        """Forget the precision of a session."""
        self._in_float16.discard(session)
