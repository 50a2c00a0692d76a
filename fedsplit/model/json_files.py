"""The reader of a checkpoint's JSON files, which anyone may have written."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit.errors import CheckpointError

MAX_BYTES = 10 << 20
"""The longest JSON file of a checkpoint, in bytes, except the index of its shards."""

MAX_BLOCKS = 4096
"""The most blocks of a model. Each takes memory and time before it has weights."""

_BLOCKS = re.compile(r".*(layers?|blocks?|depth)")
# transformers makes a name for each label, which takes minutes for ten millions.
_MAX_LABELS = 100_000


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        max_bytes: The longest file to read.

    Raises:
        CheckpointError: The file cannot be read, is too long, or holds no JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise CheckpointError(
                f"{path}: longer than {max_bytes} bytes, the most that such a file may have; it is "
                "damaged, or not the file of a model"
            )
        content = json.loads(text)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror})") from exc
    # The reader of Python calls itself for each bracket.
    except RecursionError as exc:
        raise CheckpointError(f"{path}: its brackets are nested too deep to read") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path}: not JSON ({exc})") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def require_small(config: Path) -> None:
    """Refuse a config.json that no model has, before transformers builds anything from it.

    Raises:
        CheckpointError: It cannot be read, or has too many blocks or labels.
    """
    for name, value in _fields(read_json(config)):
        most = _MAX_LABELS if name == "num_labels" else MAX_BLOCKS
        if (name == "num_labels" or _BLOCKS.fullmatch(name)) and value > most:
            raise CheckpointError(
                f"{config}: {name}={value} is too large; at most {most} are allowed"
            )


def _fields(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config and of the configs in it."""
    for name, value in content.items():
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, dict):
            yield from _fields(value)
