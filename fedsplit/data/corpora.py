"""Corpora: texts or images with their groups and classes, and which of them are held out.

A corpus is a tuple of documents with a group each. The group is natural to the source (the
topic, the file's name); where the source has none, as with the lines of a file, every document
is a group of its own. For a task with classes each document also has its class as a label.
"""

import hashlib
import random
import struct
from dataclasses import dataclass

from fedsplit.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text or an image, the natural group it belongs to, and its class where it has one.

    A text is never blank; an image has the values of its `pixels` in [0, 1], row by row, and no
    text.
    """

    text: str
    group: str
    label: str = ""
    pixels: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8 bytes, or of the image with a byte per pixel."""
        return len(self.text.encode()) + len(self.pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, under the name that reports and model cards give them."""

    name: str
    documents: tuple[Document, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all documents in bytes."""
        return sum(document.num_bytes for document in self.documents)

    @property
    def sha256(self) -> str:
        """Hex digest of texts, pixels (float32) and labels in order, a zero byte after each."""
        digest = hashlib.sha256()
        for document in self.documents:
            pixels = struct.pack(f"<{len(document.pixels)}f", *document.pixels)
            digest.update(document.text.encode() + pixels + b"\0")
            if document.label:
                digest.update(document.label.encode() + b"\0")
        return digest.hexdigest()

    @property
    def groups(self) -> dict[str, list[Document]]:
        """The documents of each group, both in the corpus's order."""
        found: dict[str, list[Document]] = {}
        for document in self.documents:
            found.setdefault(document.group, []).append(document)
        return found


def labels_of(corpus: Corpus) -> tuple[str, ...]:
    """The classes that occur, in alphabetical order; none where documents have no labels."""
    return tuple(sorted({document.label for document in corpus.documents} - {""}))


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Split off documents that are never trained on, in an order that `seed` decides.

    Where documents have labels, `share` of each label's documents is held out, at least one but
    never the last. Otherwise whole groups are, while they fit into `share` of the corpus's
    bytes; if not even one fits, the smallest.

    Returns:
        The corpus to train on and the held-out one, both in the original order.

    Raises:
        DataError: One of the two would be empty.
    """
    draw = _draw_documents if labels_of(corpus) else _draw_groups
    held = draw(corpus, share, seed)
    sides = [
        tuple(document for i, document in enumerate(corpus.documents) if (i in held) is wanted)
        for wanted in (False, True)
    ]
    if not (0 < share < 1 and all(sides)):
        raise DataError(
            f"data.held_out={share} of {corpus.name} with {_count(len(corpus.groups), 'group')} "
            "leaves one side empty; it takes a share between 0 and 1 and at least 2 groups of "
            "documents, or 2 documents of a label"
        )
    return (
        Corpus(name=corpus.name, documents=sides[0]),
        Corpus(name=f"{corpus.name} (held out)", documents=sides[1]),
    )


def _draw_documents(corpus: Corpus, share: float, seed: int) -> set[int]:
    """Numbers of the documents to hold out, of each label its share."""
    order = random.Random(f"hold_out/{seed}")
    held: set[int] = set()
    for label in labels_of(corpus):
        rows = [i for i, document in enumerate(corpus.documents) if document.label == label]
        order.shuffle(rows)
        held.update(rows[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    return held


def _draw_groups(corpus: Corpus, share: float, seed: int) -> set[int]:
    """Numbers of the documents to hold out, whole groups of them."""
    sizes = {group: sum(d.num_bytes for d in docs) for group, docs in corpus.groups.items()}
    order = list(sizes)
    random.Random(f"hold_out/{seed}").shuffle(order)
    budget, held = share * corpus.num_bytes, set[str]()
    for group in order:
        if sizes[group] <= budget:
            held.add(group)
            budget -= sizes[group]
    held = held or {min(order, key=sizes.__getitem__)}
    return {i for i, document in enumerate(corpus.documents) if document.group in held}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
