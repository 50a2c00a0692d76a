"""The sources of a corpus: one loader for each kind of `DataSpec`."""

import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fedsplit.data import records
from fedsplit.data.corpora import Corpus, Document, paragraph_runs
from fedsplit.data.files import existing, files_under, read_text
from fedsplit.data.records import Loaded
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
    not_blank = tuple(
        each for each in documents if each.text.strip() or each.pixels or each.messages
    )
    if not not_blank:
        raise DataError(f"{name} holds no text; set data.path to a file or directory with text")
    return Corpus(name=name, documents=not_blank)


# --- one loader per kind ---------------------------------------------------------------------


def _embedded(spec: DataSpec, labelled: bool) -> Loaded:
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


def _text(spec: DataSpec, labelled: bool) -> Loaded:
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


def _digits(spec: DataSpec, labelled: bool) -> Loaded:
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


_LOADERS: dict[str, Callable[[DataSpec, bool], Loaded]] = {
    "embedded": _embedded,
    "text": _text,
    "jsonl": records.jsonl,
    "hub": records.hub,
    "parquet": records.table,
    "csv": records.table,
    "saved": records.saved,
    "digits": _digits,
}
