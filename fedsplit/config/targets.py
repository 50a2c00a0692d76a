"""Import paths in a config, such as that of a strategy: resolved to objects."""

import importlib
import inspect
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


def resolve_class(target: str, base: type) -> Any:
    """Return the subclass of `base` at an import path; nothing is called.

    >>> from numbers import Number
    >>> resolve_class("fractions.Fraction", Number)
    <class 'fractions.Fraction'>

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.
        base: The class that it must be, or be a subclass of.

    Raises:
        ConfigError: The path cannot be imported, or has something else.
    """
    found = resolve(target)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(
            f"{target!r} is {found!r}; name a subclass of {base.__module__}.{base.__qualname__}"
        )
    return found


def build(target: str, base: type, **options: Any) -> Any:
    """Call the subclass of `base` at an import path, and return the object.

    >>> from numbers import Number
    >>> build("fractions.Fraction", Number, numerator=1, denominator=2)
    Fraction(1, 2)

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.
        base: The class that it must be, or be a subclass of; otherwise it is not called.
        options: Its keyword arguments.

    Raises:
        ConfigError: The path cannot be imported or has something else, or the call fails for these
            options.
    """
    found = resolve_class(target, base)
    try:
        return found(**options)
    # Our own errors may be ValueErrors too, and are clear already.
    except FedsplitError:
        raise
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{target} refuses the options {sorted(options)}: {exc}") from exc
