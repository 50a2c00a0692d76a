"""The versions of the packages that client and server should have in common."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("fedsplit", "torch", "transformers", "peft", "flwr")


@cache
def versions() -> dict[str, str]:
    """Return the installed version of each package; a missing package has none."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
