"""The interface of a task: its model's head, its examples, its loss, and its counts.

Shapes: B sequences, T tokens, C classes (of a language model its vocabulary).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from fedsplit.data.batches import IGNORED, Examples
from fedsplit.data.corpora import Corpus
from fedsplit.spec import DataSpec


class Task(ABC):
    """A task that a model is trained for. It has no state.

    Attributes:
        name: Its name in `RunSpec.task`.
        pipeline: Its name on the Hugging Face Hub, for the model card.
        head: The kind of model, as in "causal language model", for errors.
        model_classes: The model classes of transformers with this head, by class of config.
        has_classes: Whether the data has classes, and the model predicts one of them. Otherwise
            it predicts tokens of the vocabulary.
        reads_text: Whether the model has a tokenizer.
        pools: Whether all positions of a row make one prediction together.
        has_accuracy: Whether the held-out metric is the share of correct predictions. Otherwise
            it is bits per byte of text.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    head: ClassVar[str]
    model_classes: ClassVar[Any]
    has_classes: ClassVar[bool]
    reads_text: ClassVar[bool]
    pools: ClassVar[bool]
    has_accuracy: ClassVar[bool]

    @abstractmethod
    def examples(
        self,
        corpus: Corpus,
        data: DataSpec,
        tokenizer: PreTrainedTokenizerFast | None,
        labels: tuple[str, ...],
    ) -> Examples:
        """Return the examples of a client.

        Args:
            corpus: The client's corpus.
            data: The settings of the data; `sequence_length` is used.
            tokenizer: The model's tokenizer; None if the task reads no text.
            labels: All classes of the run in the order of their numbers; `()` without classes.

        Raises:
            DataError: The corpus has no document, or a document whose class is not in `labels`.
        """

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the logits that are compared with `targets`."""
        return logits

    def targets(self, labels: Tensor) -> Tensor:
        """Return the labels that are compared with `predictions`; -100 is ignored."""
        return labels

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the mean cross entropy in nats per prediction, as Hugging Face models compute it.

        Label smoothing is from Szegedy et al. 2016, "Rethinking the Inception Architecture for
        Computer Vision", arXiv 1512.00567: the target gives the label the probability
        `1 - smoothing`, and divides `smoothing` equally among all classes.

        Args:
            logits: [B, T, C] or [B, C].
            labels: [B, T] or [B].
            smoothing: In [0, 1).
        """
        # The losses of transformers are computed in float32 too, whatever the logits are in.
        return functional.cross_entropy(
            self.predictions(logits).flatten(0, -2).float(),
            self.targets(labels).flatten(),
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )

    def num_predictions(self, labels: Tensor) -> int:
        """Return the number of predictions that the loss of these labels is the mean of."""
        return int((self.targets(labels) != IGNORED).sum())

    def counts(self, logits: Tensor, labels: Tensor) -> dict[str, int]:
        """Return each of `COUNTS` for these predictions; 0 if the task has no accuracy."""
        if not self.has_accuracy:
            return dict.fromkeys(COUNTS, 0)
        predictions = self.predictions(logits)
        targets = self.targets(labels).to(predictions.device)
        return {name: int(is_so(predictions, targets).sum()) for name, is_so in COUNTS.items()}

    def num_outputs(self, config: PretrainedConfig) -> int:
        """Return C of a model of this config."""
        fields: Any = config
        outputs: int = fields.num_labels if self.has_classes else fields.vocab_size
        return outputs


def is_correct(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return for each target whether its logit is the largest."""
    return predictions.argmax(dim=-1) == targets


COUNTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "correct": is_correct,
    }
)
"""What is counted of held-out predictions, by its name in a client's reply.

Each function takes predictions [..., C] and targets [...], and says of each whether it counts.
"""
