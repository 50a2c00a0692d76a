"""Compares the epsilons of the ledger with those of dp-accounting, Google's library.

It needs the extra dp, which is part of dev: python -m simulations.accounting
"""

from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from fedsplit.client.ledger import DELTA, epsilon
from fedsplit.console import table_text

CASES = ((1.0, 1), (0.5, 1), (1.0, 16), (2.0, 128), (4.0, 3))
"""Sizes of noise, and numbers of releases."""


def epsilons(z: float, releases: int) -> tuple[float, float]:
    """Return the epsilon of dp-accounting and that of the ledger, for rows of one text."""
    # The sensitivity is twice the radius.
    one = from_gaussian_mechanism(z / 2, value_discretization_interval=1e-3)
    theirs = one.self_compose(releases).get_epsilon_for_delta(DELTA)
    return theirs, epsilon(2.0 / z * releases**0.5)


def main() -> None:
    """Print a line for each case."""
    lines = [("noise z", "releases", "dp-accounting", "ledger")]
    for z, releases in CASES:
        theirs, ours = epsilons(z, releases)
        lines.append((f"{z:g}", f"{releases}", f"{theirs:.3f}", f"{ours:.3f}"))
    print(table_text(lines))


if __name__ == "__main__":
    main()
