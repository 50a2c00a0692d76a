"""Import paths in a config, such as that of a strategy: resolved to objects."""

import importlib
import pkgutil
import sys
import threading
from pathlib import Path
from typing import Any

import fedsplit
from fedsplit.errors import ConfigError, FedsplitError

_OURS = "strategies"
_BESIDE_US = str(Path(fedsplit.__file__).resolve().parent.parent)
_PATH = threading.Lock()


def resolve(target: str) -> Any:
    """Return the object at an import path.

    The package `strategies` is the one beside this package, whatever a user's folder of that name
    has. All other modules are found as in any program.

    >>> resolve("fractions.Fraction")
    <class 'fractions.Fraction'>

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.

    Raises:
        ConfigError: The path cannot be imported.
    """
    package = target.partition(".")[0].partition(":")[0]
    try:
        if package == _OURS:
            _import_ours()
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as exc:
        found = getattr(sys.modules.get(package), "__file__", None)
        where = f"; {package} is {found}" if found else ""
        raise ConfigError(
            f"{target!r} cannot be imported ({exc}{where}); give an import path, such as "
            "flwr.serverapp.strategy.FedAvg, of a module in the current directory, on PYTHONPATH "
            "or installed"
        ) from exc


def _import_ours() -> None:
    with _PATH:
        sys.path.insert(0, _BESIDE_US)
        try:
            importlib.import_module(_OURS)
        finally:
            sys.path.remove(_BESIDE_US)


def build(target: str, **options: Any) -> Any:
    """Call the class or function at an import path, and return the result.

    >>> build("fractions.Fraction", numerator=1, denominator=2)
    Fraction(1, 2)

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.
        options: Its keyword arguments.

    Raises:
        ConfigError: The path cannot be imported or called, or the call fails for these options.
    """
    found = resolve(target)
    if not callable(found):
        raise ConfigError(f"{target!r} is {found!r}, which cannot be called; name a class")
    try:
        return found(**options)
    # Our own errors may be ValueErrors too, and are clear already.
    except FedsplitError:
        raise
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{target} refuses the options {sorted(options)}: {exc}") from exc
