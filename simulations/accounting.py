"""Compares the epsilons of the ledger with those of dp-accounting, Google's library.

dp-accounting pins older versions of what this project uses, so it has a folder of its own:

    pip install --target /tmp/accounting dp-accounting
    PYTHONPATH=/tmp/accounting python -m simulations.accounting
"""

from importlib import import_module

from fedsplit.client.ledger import DELTA, epsilon
from fedsplit.console import table_text

_CASES = ((1.0, 1), (0.5, 1), (1.0, 16), (2.0, 128), (4.0, 3))
"""Sizes of noise, and numbers of releases."""


def main() -> None:
    """Print a line for each case."""
    losses = import_module("dp_accounting.pld.privacy_loss_distribution")
    lines = [("noise z", "releases", "dp-accounting", "ledger")]
    for z, releases in _CASES:
        # The sensitivity is twice the radius.
        one = losses.from_gaussian_mechanism(z / 2, value_discretization_interval=1e-3)
        theirs = one.self_compose(releases).get_epsilon_for_delta(DELTA)
        ours = epsilon(2.0 / z * releases**0.5)
        lines.append((f"{z:g}", f"{releases}", f"{theirs:.3f}", f"{ours:.3f}"))
    print(table_text(lines))


if __name__ == "__main__":
    main()
