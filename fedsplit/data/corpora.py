"""Corpora: where text comes from, and which documents are held out.

A corpus is a tuple of documents with a label each. The label is natural to the source (the
topic, the file's name); where the source has none, as with the lines of a file, every document
is a group of its own.
"""

import hashlib
import json
import platform
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsplit.errors import DataError
from fedsplit.spec import DataSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, never blank, and the natural group it belongs to."""

    text: str
    group: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, under the name that reports and model cards give them."""

    name: str
    documents: tuple[Document, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all texts in UTF-8 bytes."""
        return sum(document.num_bytes for document in self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of the texts in their order, with a zero byte after each."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.text.encode() + b"\0")
        return digest.hexdigest()

    @property
    def groups(self) -> dict[str, list[Document]]:
        """The documents of each group, both in the corpus's order."""
        found: dict[str, list[Document]] = {}
        for document in self.documents:
            found.setdefault(document.group, []).append(document)
        return found


def load_corpus(spec: DataSpec) -> Corpus:
    """Read the corpus that `spec.kind` names; blank documents are left out.

    Raises:
        DataError: Nothing is there, it is not text, or it holds no document.
    """
    name, documents = _LOADERS[spec.kind](spec)
    kept = tuple(document for document in documents if document.text.strip())
    if not kept:
        raise DataError(f"{name} holds no text; data.path must name something with words in it")
    return Corpus(name=name, documents=kept)


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Split off whole groups that are never trained on.

    Groups are drawn in an order that `seed` decides and kept while they fit into `share` of the
    corpus's bytes; if not even one fits, the smallest is held out.

    Returns:
        The corpus to train on and the held-out one, both in the original order.

    Raises:
        DataError: One of the two would be empty.
    """
    groups = corpus.groups
    if not 0 < share < 1 or len(groups) < 2:
        raise DataError(
            f"data.held_out={share} of {corpus.name} with {_count(len(groups), 'group')} leaves "
            "one side empty; it takes a share between 0 and 1 and at least 2 groups of documents"
        )
    sizes = {group: sum(d.num_bytes for d in members) for group, members in groups.items()}
    held = _draw(sizes, share * corpus.num_bytes, seed)
    train = tuple(d for d in corpus.documents if d.group not in held)
    rest = tuple(d for d in corpus.documents if d.group in held)
    return (
        Corpus(name=corpus.name, documents=train),
        Corpus(name=f"{corpus.name} (held out)", documents=rest),
    )


def _draw(sizes: dict[str, int], budget: float, seed: int) -> set[str]:
    order = list(sizes)
    random.Random(f"hold_out/{seed}").shuffle(order)
    held: set[str] = set()
    for group in order:
        if sizes[group] <= budget:
            held.add(group)
            budget -= sizes[group]
    return held or {min(order, key=sizes.__getitem__)}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# --- one loader per kind: (name, documents) --------------------------------------------------

_Loaded = tuple[str, Iterable[Document]]


def _embedded(spec: DataSpec) -> _Loaded:
    """CPython's own documentation, each paragraph once: in the smallest topic that has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as exc:
        raise DataError(
            "data=embedded needs CPython's pydoc_data, and this Python has none; "
            "install the full standard library, or set data=text data.path=..."
        ) from exc
    seen: set[tuple[str, ...]] = set()
    kept = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept[topic] = "\n\n".join(_new_paragraphs(topics[topic], seen))
    documents = [Document(text=kept[topic], group=topic) for topic in sorted(kept)]
    return f"CPython {platform.python_version()} documentation (pydoc_data.topics)", documents


def _new_paragraphs(text: str, seen: set[tuple[str, ...]]) -> Iterator[str]:
    """The paragraphs not seen before; footnote numbers and line breaks make no difference."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = tuple(re.findall(r"[A-Za-z]+", paragraph))
        if words not in seen:
            seen.add(words)
            yield paragraph


def _text(spec: DataSpec) -> _Loaded:
    """A directory has a document per file, a file one per line."""
    root = _existing(spec)
    if root.is_file():
        return str(root), _lines(root)
    return str(root), (
        Document(text=_read(path), group=path.relative_to(root).as_posix())
        for path in sorted(root.rglob("*"), key=Path.as_posix)
        if path.is_file() and not _is_hidden(path.relative_to(root))
    )


def _lines(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        yield Document(text=line, group=f"{path.name}:{number}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _jsonl(spec: DataSpec) -> _Loaded:
    path = _existing(spec)
    if path.is_dir():
        raise DataError(f"data.path={path} is a directory; data=jsonl reads one file of JSON lines")
    return str(path), _json_lines(path, spec.field)


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            text = _json_text(line, field, f"{path}, line {number}")
            yield Document(text=text, group=f"{path.name}:{number}")


def _json_text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise DataError(
            f"{where} is not JSON: found {_excerpt(line)}; write one object per line, "
            f'like {{"{field}": "..."}}'
        ) from exc
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object: found {_excerpt(line)}")
    if field not in record:
        raise DataError(_no_field(where, field, record))
    return _string(record[field], f"{where}, field {field!r}")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where} is not a string: found {_excerpt(str(value))} ({type(value).__name__}); "
            "set data.field to the one that holds the text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"{where} holds half a surrogate pair, which is no character") from exc
    return value


def _hub(spec: DataSpec) -> _Loaded:
    """`data.path` is a data set's hub id, or `id:configuration` where it has several."""
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
    if spec.field not in rows.column_names:
        raise DataError(_no_field(spec.path, spec.field, rows.column_names))
    return spec.path, (
        Document(text=_string(text, f"{spec.path}, row {number}"), group=f"{spec.path}:{number}")
        for number, text in enumerate(rows[spec.field], start=1)
    )


_LOADERS: dict[str, Callable[[DataSpec], _Loaded]] = {
    "embedded": _embedded,
    "text": _text,
    "jsonl": _jsonl,
    "hub": _hub,
}


# --- files, and what to say of them ----------------------------------------------------------


def _existing(spec: DataSpec) -> Path:
    path = Path(spec.path).expanduser()
    if not path.exists():
        raise DataError(
            f"data.path={spec.path} does not exist (looked from {Path.cwd()}); "
            f"data={spec.kind} needs a file{' or directory' if spec.kind == 'text' else ''}"
        )
    return path


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path} is not UTF-8 text: found byte {exc.object[exc.start]:#04x} at offset "
            f"{exc.start}; convert it, or leave it out of data.path"
        ) from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}; check its permissions") from exc
    if "\0" in text:
        raise DataError(
            f"{path} is not UTF-8 text: found byte 0x00 at character {text.index(chr(0))}; "
            "convert it, or leave it out of data.path"
        )
    return text


def _no_field(where: str, field: str, there: Iterable[str]) -> str:
    found = ", ".join(map(repr, there)) or "none"
    return f"{where} has no field {field!r}: found {found}; set data.field to another"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
