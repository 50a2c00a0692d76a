"""Import paths: what a config names by path, such as a strategy, becomes an object."""

import pkgutil
from typing import Any

from fedsplit.errors import ConfigError, FedsplitError


def resolve(target: str) -> Any:
    """Return what an import path names.

    >>> resolve("fractions.Fraction")
    <class 'fractions.Fraction'>

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.

    Raises:
        ConfigError: The path leads to nothing.
    """
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(
            f"{target!r} cannot be imported ({exc}); give an import path, such as "
            "flwr.serverapp.strategy.FedAvg"
        ) from exc


def build(target: str, **options: Any) -> Any:
    """Make the object that an import path names.

    >>> build("fractions.Fraction", numerator=1, denominator=2)
    Fraction(1, 2)

    Args:
        target: Such as `flwr.serverapp.strategy.FedAvg`.
        options: What to call it with.

    Raises:
        ConfigError: The path does not lead to a callable, or it refuses the options.
    """
    found = resolve(target)
    if not callable(found):
        raise ConfigError(f"{target!r} is {found!r}, which cannot be called; name a class")
    try:
        return found(**options)
    except FedsplitError:
        raise
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{target} refuses the options {sorted(options)}: {exc}") from exc
