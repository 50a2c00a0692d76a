"""Import paths in a config, such as that of a strategy: resolved to objects."""

import pkgutil
from typing import Any

from fedsplit.errors import ConfigError, FedsplitError


def resolve(target: str) -> Any:
    """Return the object at an import path.

    >>> resolve("fractions.Fraction")
    <class 'fractions.Fraction'>

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.

    Raises:
        ConfigError: The path cannot be imported.
    """
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(
            f"{target!r} cannot be imported ({exc}); give an import path, such as "
            "flwr.serverapp.strategy.FedAvg"
        ) from exc


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
