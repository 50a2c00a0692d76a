"""Classification: the model predicts one class for every row.

Shapes: N rows, B rows of a batch.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedsplit.data.batches import Batch
from fedsplit.data.corpora import Corpus
from fedsplit.data.tasks.base import Task
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec


class Classification(Task):
    """Prediction of a document's class; the held-out metric is accuracy."""

    has_classes = True
    pools = True
    has_accuracy = True

    def examples(
        self,
        corpus: Corpus,
        data: DataSpec,
        tokenizer: PreTrainedTokenizerFast | None,
        labels: tuple[str, ...],
    ) -> "Labelled":
        """Return a row per document; see `Task.examples`."""
        if not corpus.documents:
            raise DataError(f"{corpus.name} has no documents; every client needs at least one")
        if data.assistant_only_loss:
            raise DataError(
                "data.assistant_only_loss is for language models, and a classifier has one loss a "
                "document; set data.assistant_only_loss=false"
            )
        inputs = self._inputs(corpus, data, tokenizer)
        return Labelled(inputs=inputs, labels_N=_classes(corpus, labels))

    @abstractmethod
    def _inputs(
        self, corpus: Corpus, data: DataSpec, tokenizer: PreTrainedTokenizerFast | None
    ) -> dict[str, Tensor]:
        """Return the arguments of the model's forward, with a row per document."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Rows with one class each: texts as tokens, or images.

    Attributes:
        inputs: The arguments of the model's forward, with N rows each.
        labels_N: The numbers of the classes, int64.
    """

    inputs: dict[str, Tensor]
    labels_N: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels_N)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the rows with these numbers, in this order."""
        index_B = torch.tensor(rows)
        return Batch(
            inputs={name: tensor[index_B] for name, tensor in self.inputs.items()},
            labels=self.labels_N[index_B],
            num_tokens=len(index_B),
            num_bytes=0,
            examples_B=index_B,
        )


def _classes(corpus: Corpus, labels: tuple[str, ...]) -> Tensor:
    number = {label: i for i, label in enumerate(labels)}
    unknown = sorted({document.label for document in corpus.documents} - set(labels))
    if unknown:
        raise DataError(
            f"{corpus.name} has documents of class {unknown[0]!r}, but the classes of this run "
            f"are {', '.join(labels)}; all clients need the classes that the server knows"
        )
    return torch.tensor([number[document.label] for document in corpus.documents])
