"""Runs one case of the fuzzer again, and prints what it sent, what it got and how it ended.

    python -m simulations.fuzzing --case 4711

`python -m simulations.bench fuzz` runs many cases, and names those that ended wrongly.
"""

import argparse

import torch

from fedsplit.console import quiet_libraries
from simulations.fuzzing.campaign import replay


def main() -> None:
    """Run the case of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.fuzzing", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--case", type=int, required=True, metavar="N", help="the case's number")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    print(replay(arguments.case, seed=arguments.seed))


if __name__ == "__main__":
    main()
