"""The check of the gradient norm that a trunk reports, against the client's own."""

import math

from fedsplit.errors import GradExploded

MAX_RATIO = 1e6
"""The most times that the trunk's norm is the client's. Gradients of one loss are far closer."""


def require_comparable_norms(trunk_sq_norm: float, client_sq_norm: float, step: int) -> None:
    """Refuse a trunk's norm that would freeze the client.

    Clipping by the norm of all parts divides the client's gradients by the trunk's norm, so a large
    one makes every step of the client as small as the trunk's server likes.

    Args:
        trunk_sq_norm: The squared gradient norm that the trunk reported.
        client_sq_norm: That of the client; if it is 0, there is nothing to freeze.
        step: The number of the step, for the text of the error.

    Raises:
        GradExploded: The trunk's norm is too large.
    """
    if 0.0 < client_sq_norm * MAX_RATIO**2 < trunk_sq_norm:
        raise GradExploded(
            f"the trunk reports a gradient norm of {math.sqrt(trunk_sq_norm):g} for step {step}, "
            f"more than {MAX_RATIO:g} times the client's own {math.sqrt(client_sq_norm):g}; the "
            "step was refused, and no weight of this client has changed; the trunk has diverged, "
            "or its server is faulty"
        )
