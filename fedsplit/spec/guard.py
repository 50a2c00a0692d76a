"""The settings of the guard against contributions that are out of proportion."""

from dataclasses import dataclass
from typing import Annotated

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import DURATION, MAX_SECONDS, AtLeast, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSpec:
    """The guard of a server, which compares the norm of each contribution with those before it.

    A contribution is a client's gradient at the trunk, or its change of the client weights. The
    settings are the server's own; a run's fingerprint does not have them.

    Attributes:
        clip_above (medians): A contribution whose norm is above this multiple of the median is
            clipped to the multiple (0: not at all). The median is that of the clients' last
            norms, or a larger one of this round or the last ones.
        refuse_above (medians): A contribution whose norm is above this multiple is refused (0: not
            at all).
        window (clients): The most clients that the median is of: those that contributed last.
        after (contributions): The number of contributions after which the guard begins, if they
            are of three clients at least, or of all of a run with fewer.
        refusals (refusals): The refusals in a row after which a client is in quarantine.
        quarantine_s (seconds): The time of a client's first quarantine, which doubles with each
            further one (0: no quarantine).
        quarantine_most_s (seconds): The longest time of a quarantine.
        bad_steps (steps): The steps in a row that more than half of the clients could not take,
            because of their numbers, after which training goes back to the last checkpoint at half
            the learning rate (0: it does not). If it diverges again, the run ends.
        worse_loss (losses): Training also goes back if the held-out loss of more than half of the
            clients is not finite, or above this multiple of their own lowest one so far (0: it does
            not).
    """

    clip_above: Annotated[float, AtLeast(0)] = 10.0
    refuse_above: Annotated[float, AtLeast(0)] = 100.0
    window: Annotated[int, AtLeast(1)] = 50
    after: Annotated[int, AtLeast(1)] = 20
    refusals: Annotated[int, AtLeast(1)] = 3
    quarantine_s: Annotated[float, AtLeast(0, most=MAX_SECONDS)] = 60.0
    quarantine_most_s: Annotated[float, DURATION] = 3600.0
    bad_steps: Annotated[int, AtLeast(0)] = 3
    worse_loss: Annotated[float, AtLeast(0)] = 10.0

    def __post_init__(self) -> None:
        check_fields(self, "guard")
        if 0 < self.refuse_above < self.clip_above:
            raise ConfigError(
                f"guard.refuse_above={self.refuse_above} is below "
                f"guard.clip_above={self.clip_above}, so nothing would be clipped; raise it"
            )
