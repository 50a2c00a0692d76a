"""The sources of a corpus: one loader for each kind of `DataSpec`."""

import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedsplit.data.corpora import Corpus, Document, paragraph_runs
from fedsplit.data.files import existing, files_under, read_text
from fedsplit.data.tasks import TASKS
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec

EMBEDDED_CLASSES = 6
# A shorter passage, such as a heading, rarely shows its class.
PASSAGE_CHARS = 100


def load_corpus(spec: DataSpec, task: str = "causal_lm") -> Corpus:
    """Read the corpus of `spec.kind`; blank documents are left out.

    For a task with classes, every document gets a label: the field `spec.label` of a record
    (jsonl, hub), the name of its sub-directory (text), the topic (embedded) or the digit (digits).

    Args:
        spec: The source.
        task: Name of the task.

    Raises:
        DataError: The source does not exist, is not text, has no document, or has a document
            without a class.
    """
    name, documents = _LOADERS[spec.kind](spec, TASKS[task].has_classes)
    not_blank = tuple(each for each in documents if each.text.strip() or each.pixels)
    if not not_blank:
        raise DataError(f"{name} holds no text; set data.path to a file or directory with text")
    return Corpus(name=name, documents=not_blank)


# --- one loader per kind ---------------------------------------------------------------------

_Loaded = tuple[str, Iterable[Document]]  # the corpus's name, and its documents


def _embedded(spec: DataSpec, labelled: bool) -> _Loaded:
    """The documentation of CPython, with each paragraph in the smallest of its topics only.

    With labels, the documents are passages of one or more paragraphs of the six largest topics
    (such as `string-methods`, `compound` and `debugger`), and the topic is the class. These are
    about 500 passages; a bag of words predicts the class of four out of five.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as exc:
        raise DataError(
            "data=embedded needs CPython's pydoc_data, and this Python has none; "
            "install the full standard library, or set data=text data.path=..."
        ) from exc
    # A paragraph in two topics could be trained on by one client and held out from another.
    seen: set[tuple[str, ...]] = set()
    texts = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        texts[topic] = "\n\n".join(_new_paragraphs(topics[topic], seen))
    documents = [Document(text=texts[topic], group=topic) for topic in sorted(texts)]
    if labelled:
        largest = sorted(documents, key=lambda document: -document.num_bytes)[:EMBEDDED_CLASSES]
        documents = [
            Document(text=passage.strip(), group=topic.group, label=topic.group)
            for topic in largest
            for passage in paragraph_runs(topic.text, PASSAGE_CHARS)[0]
        ]
    return f"CPython {platform.python_version()} documentation (pydoc_data.topics)", documents


def _new_paragraphs(text: str, seen: set[tuple[str, ...]]) -> Iterator[str]:
    """Yield the paragraphs that are not in `seen`, compared without digits and line breaks."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = tuple(re.findall(r"[A-Za-z]+", paragraph))
        if words not in seen:
            seen.add(words)
            yield paragraph


def _text(spec: DataSpec, labelled: bool) -> _Loaded:
    """A document per file of a directory, or per line of a file; sub-directories are classes."""
    root = existing(spec.path, spec.kind, "a file or directory")
    if root.is_file() and labelled:
        raise DataError(
            f"data.path={root} is one file, and a text file names no classes; give a directory "
            "whose sub-directories are the classes, or use data=jsonl with data.label"
        )
    if root.is_file():
        return str(root), _lines(root)
    return str(root), _files(root, labelled)


def _files(root: Path, labelled: bool) -> Iterator[Document]:
    for path in files_under(root):
        relative = path.relative_to(root)
        label = relative.parts[0] if labelled and len(relative.parts) > 1 else ""
        if labelled and not label:
            raise DataError(
                f"{path} lies in no sub-directory and so has no class; data=text takes the classes "
                "from data.path/CLASS/FILE"
            )
        yield Document(text=read_text(path), group=relative.as_posix(), label=label)


def _lines(path: Path) -> Iterator[Document]:
    # str.splitlines would also split at separators inside of a line, such as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        yield Document(text=line, group=f"{path.name}:{number}")


def _jsonl(spec: DataSpec, labelled: bool) -> _Loaded:
    path = existing(spec.path, spec.kind, "a file")
    if path.is_dir():
        raise DataError(f"data.path={path} is a directory; data=jsonl reads one file of JSON lines")
    return str(path), _json_lines(path, spec, labelled)


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
    """Return the document of a record: its text, and its label for a task with classes."""
    text = _string(_field(record, spec.field, "data.field", where), where, spec.field)
    label = ""
    if labelled:
        value = _field(record, spec.label, "data.label", where)
        if not isinstance(value, (str, int)) or value == "":
            raise DataError(
                f"{where}, field {spec.label!r} is no class: found {_excerpt(str(value))} "
                f"({type(value).__name__}); set data.label to a field with strings or whole numbers"
            )
        label = str(value)
    return Document(text=text, group=group, label=label)


def _field(record: dict[str, Any], name: str, setting: str, where: str) -> Any:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where} has no field {name!r}: found {found}; set {setting} to another field"
        )
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


def _hub(spec: DataSpec, labelled: bool) -> _Loaded:
    """A data set of the hub; `data.path` is its id, or `id:configuration` if it has several."""
    try:
        import datasets
    except ImportError as exc:
        raise DataError(
            "data=hub needs the datasets library, which is not installed; "
            "run: pip install 'fedsplit[hub]'"
        ) from exc
    repository, _, configuration = spec.path.partition(":")
    try:
        rows = datasets.load_dataset(repository, configuration or None, split=spec.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
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


def _digits(spec: DataSpec, labelled: bool) -> _Loaded:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels; the digit is the class."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise DataError(
            "data=digits needs scikit-learn, which is not installed; "
            "run: pip install 'fedsplit[images]'"
        ) from exc
    images, digits = load_digits(return_X_y=True)
    # Pixels are whole numbers from 0 to 16.
    return "scikit-learn's handwritten digits", (
        Document(text="", group=f"digits:{number}", label=str(digit), pixels=tuple(pixels.tolist()))
        for number, (pixels, digit) in enumerate(zip(images / 16, digits, strict=True), start=1)
    )


_LOADERS: dict[str, Callable[[DataSpec, bool], _Loaded]] = {
    "embedded": _embedded,
    "text": _text,
    "jsonl": _jsonl,
    "hub": _hub,
    "digits": _digits,
}


def _excerpt(text: str) -> str:
    # A line may be a whole document.
    return repr(text if len(text) <= 40 else text[:40] + "...")
