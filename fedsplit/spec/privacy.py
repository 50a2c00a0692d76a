"""The settings of what clients do to the tensors that leave them."""

from dataclasses import dataclass
from typing import Annotated

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import AtLeast, OneOf, check_fields

LEAST_NOISE = 1e-6
"""The least size of noise; less would hide nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpec:
    """The noise on what leaves a client, so that a server reads less of it.

    The config of a SuperNode may set its own in place of the run's.

    Attributes:
        kind: Nothing (off), noise on smashed data and gradients (noise), or noise, no gradients and
            sealed client weights or none (strict).
        z (radii): The standard deviation of the noise on each coordinate of the smashed data, in
            units of the median distance of public rows from their mean, to which rows are clipped.
        gradient_z (radii): That of the noise on the gradients, which determine the labels (0: they
            are sent as they are).
        public: The file of public text whose rows give mean, radius and covariance; empty for
            random tokens.
        budget_bits (bits): The most that the noisy rows and gradients of a text may tell of each of
            its tokens, in the mean over the text and summed over all releases (0: no bound).
        audit: Whether simulations.run measures at the end what a server reads of the run (end).
    """

    kind: Annotated[str, OneOf("off", "noise", "strict")] = "off"
    z: Annotated[float, AtLeast(0, most=1000)] = 0.5
    gradient_z: Annotated[float, AtLeast(0, most=1000)] = 0.5
    public: str = ""
    budget_bits: Annotated[float, AtLeast(0)] = 0.0
    audit: Annotated[str, OneOf("off", "end")] = "off"

    def __post_init__(self) -> None:
        check_fields(self, "privacy")
        if self.kind != "off" and self.z < LEAST_NOISE:
            raise ConfigError(
                f"privacy={self.kind} with privacy.z={self.z} has no noise, and the server reads "
                f"everything; set privacy.z to {LEAST_NOISE:g} or more, or privacy=off if you mean "
                "it"
            )
        if 0 < self.gradient_z < LEAST_NOISE:
            raise ConfigError(
                f"privacy.gradient_z={self.gradient_z} is no noise; set {LEAST_NOISE:g} or more, "
                "or 0 to send gradients as they are"
            )
