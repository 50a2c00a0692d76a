"""Run a statement in an interpreter that has only the core's libraries, nothing of the doors'.

python alone.py STATEMENT: flwr, hydra, omegaconf, grpc and ray cannot be imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

DOORS = ("flwr", "hydra", "omegaconf", "grpc", "grpc_health", "ray")


class Refuse(MetaPathFinder):
    """Finds none of the doors' libraries."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name.partition(".")[0] in DOORS:
            raise ImportError(f"the core needs {name}")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    exec(sys.argv[1], {"__name__": "__main__"})
