"""Corpora of records: JSON lines, and all that the `datasets` library reads."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedsplit.data.corpora import Document, Turn
from fedsplit.data.files import existing, files_under, read_text
from fedsplit.data.hub import is_full, loading_data_set
from fedsplit.errors import DataError, FedsplitError, StorageError
from fedsplit.spec import DataSpec

# The usual name of the field that has a conversation.
_MESSAGES = "messages"

Loaded = tuple[str, Iterable[Document]]
"""The corpus's name, and its documents."""


def jsonl(spec: DataSpec, labelled: bool) -> Loaded:
    """A file of JSON lines."""
    path = existing(spec.path, spec.kind, "a file")
    if path.is_dir():
        raise DataError(f"data.path={path} is a directory; data=jsonl reads one file of JSON lines")
    return str(path), _json_lines(path, spec, labelled)


def hub(spec: DataSpec, labelled: bool) -> Loaded:
    """A data set of the hub; `data.path` is its id, or `id:configuration` if it has several."""
    repository, _, configuration = spec.path.partition(":")

    def load(datasets: Any) -> Any:
        with loading_data_set(repository, datasets):
            return datasets.load_dataset(repository, configuration or None, split=spec.split)

    return _documents(load, spec, labelled)


def table(spec: DataSpec, labelled: bool) -> Loaded:
    """A Parquet or CSV file, or all such files of a directory."""
    root = existing(spec.path, spec.kind, "a file or directory")
    ending = f".{spec.kind}"
    paths = [root] if root.is_file() else [p for p in files_under(root) if p.suffix == ending]
    if not paths:
        raise DataError(f"data.path={root} has no file whose name ends with {ending}")
    # Otherwise "NA", "None" and the empty text are read as missing.
    options = {"keep_default_na": False} if spec.kind == "csv" else {}
    return _documents(
        lambda datasets: datasets.load_dataset(
            spec.kind, data_files=[str(path) for path in paths], split="train", **options
        ),
        spec,
        labelled,
    )


def saved(spec: DataSpec, labelled: bool) -> Loaded:
    """A data set that `save_to_disk` of `datasets` wrote, or the split of several."""
    root = existing(spec.path, spec.kind, "a directory")

    def load(datasets: Any) -> Any:
        found = datasets.load_from_disk(str(root))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if spec.split not in found:
            raise DataError(
                f"data.path={root} has no split {spec.split!r}: found {', '.join(found)}; set "
                "data.split"
            )
        return found[spec.split]

    return _documents(load, spec, labelled)


def _documents(load: Callable[[Any], Any], spec: DataSpec, labelled: bool) -> Loaded:
    """Return the rows that `load` loads; it is called with the `datasets` library."""
    try:
        import datasets
    except ImportError as exc:
        raise DataError(
            f"data={spec.kind} needs the datasets library, which is not installed; "
            "run: pip install 'fedsplit[hub]'"
        ) from exc
    try:
        rows = load(datasets)
    except FedsplitError:
        raise
    # RuntimeError: the data set is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as exc:
        if is_full(exc):
            raise StorageError(
                f"{datasets.config.HF_DATASETS_CACHE}, where datasets keeps a copy of what it "
                "reads, cannot be written: no space left; make room, or set HF_HOME to a folder "
                "on another disk"
            ) from exc
        raise DataError(
            f"data.path={spec.path} with data.split={spec.split} cannot be loaded: {exc}"
        ) from exc
    columns = dict.fromkeys(rows.column_names)
    fields = {"data.field": spec.field} | ({"data.label": spec.label} if labelled else {})
    for setting, name in fields.items():
        _field(columns, name, setting, spec.path)
    # Other columns, such as images, would be decoded for every row.
    rows = rows.select_columns(list(dict.fromkeys(fields.values())))
    return spec.path, (
        _from_record(
            row, spec, labelled, group=f"{spec.path}:{number}", where=f"{spec.path}, row {number}"
        )
        for number, row in enumerate(rows, start=1)
    )


# --- one record ------------------------------------------------------------------------------


def _json_lines(path: Path, spec: DataSpec, labelled: bool) -> Iterator[Document]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            record = _json_object(line, spec.field, where)
            group = f"{path.name}:{number}"
            yield _from_record(record, spec, labelled, group=group, where=where)


def _json_object(line: str, field: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    # Deeply nested JSON raises RecursionError.
    except (ValueError, RecursionError) as exc:
        raise DataError(
            f"{where} is not JSON: found {_excerpt(line)}; write one object per line, "
            f'like {{"{field}": "..."}}'
        ) from exc
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object: found {_excerpt(line)}")
    return record


def _from_record(
    record: dict[str, Any], spec: DataSpec, labelled: bool, *, group: str, where: str
) -> Document:
    """Return the document of a record: its text or conversation, and its label for a classifier."""
    value = _field(record, spec.field, "data.field", where)
    if isinstance(value, list):
        if labelled:
            raise DataError(
                f"{where}, field {spec.field!r} is a conversation, and a classifier reads texts; "
                "set data.field to a field with text"
            )
        turns = _turns(value, f"{where}, field {spec.field!r}")
        return Document(text="", group=group, messages=turns)
    text, label = _string(value, where, spec.field), ""
    if labelled:
        value = _field(record, spec.label, "data.label", where)
        if not isinstance(value, (str, int)) or value == "":
            raise DataError(
                f"{where}, field {spec.label!r} is no class: found {_excerpt(str(value))} "
                f"({type(value).__name__}); set data.label to a field with strings or whole numbers"
            )
        label = str(value)
    return Document(text=text, group=group, label=label)


def _turns(messages: list[Any], where: str) -> tuple[Turn, ...]:
    turns = []
    for number, message in enumerate(messages, start=1):
        # Tables have all fields in all messages, with null for those that a message lacks.
        given = (
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        )
        if given.keys() != {"role", "content"}:
            raise DataError(
                f"{where}, message {number} has no role and content alone: found "
                f"{_excerpt(str(message))}; a conversation is a list like "
                '[{"role": "user", "content": "..."}]'
            )
        role, content = (_string(given[name], where, name) for name in ("role", "content"))
        turns.append(Turn(role=role, content=content))
    return tuple(turns)


def _field(record: dict[str, Any], name: str, setting: str, where: str) -> Any:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        way_out = f"set {setting} to another field"
        if setting == "data.field" and _MESSAGES in record:
            way_out = f"set data.field={_MESSAGES} to train on these conversations"
        raise DataError(f"{where} has no field {name!r}: found {found}; {way_out}")
    return record[name]


def _string(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}, field {field!r} is not a string: found {_excerpt(str(value))} "
            f"({type(value).__name__}); set data.field to the one that holds the text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise DataError(
            f"{where}, field {field!r} is not Unicode text: it has half of a surrogate pair; "
            "remove it"
        ) from exc
    return value


def _excerpt(text: str) -> str:
    # A line may be a whole document.
    return repr(text if len(text) <= 40 else text[:40] + "...")
