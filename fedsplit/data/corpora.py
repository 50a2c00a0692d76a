"""Corpora: documents (texts, conversations, images) with groups and labels, and the held-out ones.

A corpus is a tuple of documents, each in one group. The source defines the group (the topic, the
file's name); if the source has no groups, as for the lines of a file, every document is a group
of its own. For a task with classes, the label of a document is its class.
"""

import hashlib
import random
import re
import struct
from dataclasses import dataclass

from fedsplit.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message of a conversation, and the role of its writer, such as `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, a conversation or an image, its group, and its class if it has one.

    A text is never blank. A conversation has `messages` and no text. An image has no text, and
    `pixels` are its values in [0, 1], row by row.
    """

    text: str
    group: str
    label: str = ""
    pixels: tuple[float, ...] = ()
    messages: tuple[Turn, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the text or the messages in UTF-8 bytes, or of the image, a byte per pixel."""
        texts = (self.text, *(turn.content for turn in self.messages))
        return sum(len(text.encode()) for text in texts) + len(self.pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, and the corpus's name in reports and model cards."""

    name: str
    documents: tuple[Document, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all documents in bytes."""
        return sum(document.num_bytes for document in self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of texts, pixels (float32), messages and labels, a zero byte after each."""
        digest = hashlib.sha256()
        for document in self.documents:
            pixels = struct.pack(f"<{len(document.pixels)}f", *document.pixels)
            digest.update(document.text.encode() + pixels + b"\0")
            for turn in document.messages:
                digest.update(turn.role.encode() + b"\0" + turn.content.encode() + b"\0")
            # Without labels, the digest is that of versions before labels existed.
            if document.label:
                digest.update(document.label.encode() + b"\0")
        return digest.hexdigest()

    @property
    def groups(self) -> dict[str, list[Document]]:
        """The documents of each group, both in the corpus's order."""
        by_group: dict[str, list[Document]] = {}
        for document in self.documents:
            by_group.setdefault(document.group, []).append(document)
        return by_group


def paragraph_runs(text: str, min_chars: int) -> tuple[list[str], str]:
    r"""Cut a text after blank lines into the shortest runs of at least `min_chars` characters.

    White space at either end of a run does not count.

    Returns:
        The runs, and the rest of the text, which is too short for a run. Together they are the
        text.

    >>> paragraph_runs("a heading\n\na paragraph\n\nan end", 12)
    (['a heading\n\na paragraph\n\n'], 'an end')
    """
    runs, start, end, first = list[str](), 0, 0, -1
    for paragraph in re.split(r"(?<=\n\n)", text):
        begin, end = end, end + len(paragraph)
        last = begin + len(paragraph.rstrip())
        # Blank paragraphs are skipped: a text may have thousands of them in a row.
        if last > begin:
            first = end - len(paragraph.lstrip()) if first < 0 else first
            if last - first >= min_chars:
                runs.append(text[start:end])
                start, first = end, -1
    return runs, text[start:]


def labels_of(corpus: Corpus) -> tuple[str, ...]:
    """Return the classes of a corpus in alphabetical order; none if documents have no labels."""
    return tuple(sorted({document.label for document in corpus.documents} - {""}))


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Split a corpus into one to train on and a held-out one; `seed` decides the documents.

    If documents have labels, `share` of each label's documents are held out, at least one of a
    label but not its last one. Otherwise whole groups are held out, as long as they fit into
    `share` of the corpus's bytes; if no group fits, the smallest group is.

    Returns:
        The corpus to train on and the held-out one, both in the original order.

    Raises:
        DataError: One of the two would be empty.
    """
    draw = _draw_documents if labels_of(corpus) else _draw_groups
    held_out = draw(corpus, share, seed)
    sides = [
        tuple(document for i, document in enumerate(corpus.documents) if (i in held_out) is side)
        for side in (False, True)
    ]
    if not (0 < share < 1 and all(sides)):
        raise DataError(
            f"data.held_out={share} of {corpus.name} with {_count(len(corpus.groups), 'group')} "
            "leaves one side empty; it takes a share between 0 and 1 and at least 2 groups of "
            "documents, or 2 documents of a label. Each file of a folder, each line of a single "
            "text file and each record is a group: give more of them"
        )
    return (
        Corpus(name=corpus.name, documents=sides[0]),
        Corpus(name=f"{corpus.name} (held out)", documents=sides[1]),
    )


def _draw_documents(corpus: Corpus, share: float, seed: int) -> set[int]:
    """Return the numbers of the documents to hold out: `share` of each label."""
    # The prefix makes this stream independent of the others of the same seed.
    order = random.Random(f"hold_out/{seed}")
    held_out: set[int] = set()
    for label in labels_of(corpus):
        rows = [i for i, document in enumerate(corpus.documents) if document.label == label]
        order.shuffle(rows)
        held_out.update(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    return held_out


def _draw_groups(corpus: Corpus, share: float, seed: int) -> set[int]:
    """Return the numbers of the documents to hold out, in whole groups."""
    sizes = {group: sum(d.num_bytes for d in docs) for group, docs in corpus.groups.items()}
    order = list(sizes)
    random.Random(f"hold_out/{seed}").shuffle(order)
    budget, held_out = share * corpus.num_bytes, set[str]()
    for group in order:
        if sizes[group] <= budget:
            held_out.add(group)
            budget -= sizes[group]
    held_out = held_out or {min(order, key=sizes.__getitem__)}
    return {i for i, document in enumerate(corpus.documents) if document.group in held_out}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
