"""The reader of a checkpoint's JSON files, which anyone may have written."""

import json
from pathlib import Path
from typing import Any

from fedsplit.errors import CheckpointError

MAX_BYTES = 10 << 20
"""The longest JSON file of a checkpoint, in bytes, except the index of its shards."""


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
