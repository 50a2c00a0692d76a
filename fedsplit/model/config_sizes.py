"""The sizes in a model's config: those that no model has, and the errors of building with them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fedsplit.errors import CheckpointError, ConfigError, FedsplitError, UnsupportedModel
from fedsplit.model.dryrun import FAMILY_ERRORS

MAX_BLOCKS = 4096
"""The most blocks of a model. Each takes memory and time before it has weights."""

_BLOCKS = re.compile(r".*(layers?|blocks?|depth)")
# transformers makes a name for each label, which takes minutes for ten millions.
_MAX_LABELS = 100_000
_SIZES = re.compile(r".*(size|heads?|layers?|blocks?|depth|dim|embd|model|positions|channels)")


def require_small(config: Path, content: Mapping[str, Any]) -> None:
    """Refuse a config.json that no model has, before transformers builds anything from it.

    Args:
        config: The file, for the error.
        content: The object in it.

    Raises:
        CheckpointError: It has too many blocks or labels.
    """
    for name, value in _numbers(content):
        most = _MAX_LABELS if name == "num_labels" else MAX_BLOCKS
        if (name == "num_labels" or _BLOCKS.fullmatch(name)) and value > most:
            raise CheckpointError(
                f"{config}: {name}={value} is too large; at most {most} are allowed"
            )


def too_small(content: Mapping[str, Any]) -> str:
    """The sizes in a config that are below 1, such as "n_head=0, vocab_size=-1"; empty if none.

    Some families have a size of 0 for what they do without. So this is no error by itself.
    """
    return ", ".join(
        f"{name}={value}"
        for name, value in _numbers(content)
        if value < 1 and _SIZES.fullmatch(name)
    )


@contextmanager
def building(config: PretrainedConfig) -> Iterator[None]:
    """A context in which the own code of a family builds a model of this config.

    Raises:
        ConfigError: It failed, and the config has sizes below 1.
        UnsupportedModel: It failed for another reason.
    """
    try:
        yield
    except FedsplitError:
        raise
    except FAMILY_ERRORS as exc:
        cause = f"{type(exc).__name__}: {exc}"
        if sizes := too_small(config.to_diff_dict()):
            raise ConfigError(
                f"the config of a {config.model_type} model has {sizes}, with which it cannot be "
                f"built ({cause}); sizes are at least 1"
            ) from exc
        raise UnsupportedModel(
            f"a {config.model_type} model of this config cannot be built ({cause})"
        ) from exc


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config and of the configs in it."""
    for name, value in content.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        elif isinstance(value, dict):
            yield from _numbers(value)
