"""Language modeling: every token predicts the next one.

Documents are packed: the documents of one client are concatenated, each with its special tokens,
and cut into sequences of one length. Only the last sequence is padded. No sequence has documents of
two clients. Sequences in which the loss counts no token are left out.

Shapes: N sequences, B sequences of a batch, T tokens of a sequence, S tokens of a whole shard,
C classes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fedsplit.data.batches import IGNORED, Batch
from fedsplit.data.corpora import Corpus
from fedsplit.data.encoding import encode
from fedsplit.data.tasks.base import Task
from fedsplit.data.tokenizing import token_bytes
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec


class CausalLM(Task):
    """Prediction of every next token; the held-out metric is bits per byte."""

    name = "causal_lm"
    pipeline = "text-generation"
    head = "causal language"
    model_classes = MODEL_FOR_CAUSAL_LM_MAPPING
    has_classes = False
    reads_text = True
    pools = False
    has_accuracy = False

    def examples(
        self,
        corpus: Corpus,
        data: DataSpec,
        tokenizer: PreTrainedTokenizerFast | None,
        labels: tuple[str, ...],
    ) -> "Sequences":
        """Return sequences of `data.sequence_length` tokens; see `Task.examples`."""
        assert tokenizer is not None, "a task that reads text has a tokenizer"
        return tokenize(corpus, tokenizer, data)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the logits [B, T - 1, C] of all tokens but the last."""
        return logits[:, :-1]

    def targets(self, labels: Tensor) -> Tensor:
        """Return the labels [B, T - 1] of all tokens but the first."""
        return labels[:, 1:]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """Sequences of T tokens; all are full except the last, which has at least two tokens.

    Attributes:
        ids_NT: The tokens; after the first `lengths_N` of a sequence, padding.
        is_target_NT: Whether the loss counts the prediction of the token; not for padding.
        lengths_N: The number of tokens of each sequence; int64.
        bytes_V: The number of UTF-8 bytes of each token of the vocabulary; int64.
    """

    ids_NT: Tensor
    is_target_NT: Tensor
    lengths_N: Tensor
    bytes_V: Tensor

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.ids_NT)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the sequences with these numbers, in this order."""
        index_B = torch.tensor(rows)
        ids_BT, lengths_B = self.ids_NT[index_B], self.lengths_N[index_B]
        is_real_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        is_target_BT = self.is_target_NT[index_B]
        # The first token of a sequence is not predicted, so its bytes do not count.
        predicted = ids_BT[:, 1:][is_target_BT[:, 1:]]
        return Batch(
            inputs={"input_ids": ids_BT, "attention_mask": is_real_BT.long()},
            labels=ids_BT.masked_fill(~is_target_BT, IGNORED),
            num_tokens=predicted.numel(),
            num_bytes=int(self.bytes_V[predicted].sum()),
            examples_B=index_B,
        )


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, data: DataSpec) -> Sequences:
    """Pack the corpus of one client into sequences of `data.sequence_length` tokens.

    Raises:
        DataError: The corpus has no document, or none with a token for the loss; or as in `encode`.
    """
    if not corpus.documents:
        raise DataError(f"{corpus.name} has no documents; every client needs at least one")
    ids_S, is_target_S = encode(corpus, tokenizer, data)
    length = data.sequence_length
    # A last sequence of one token would predict nothing.
    if len(ids_S) % length == 1:
        ids_S, is_target_S = ids_S[:-1], is_target_S[:-1]
    num_padding = -len(ids_S) % length
    ids_NT = pad(ids_S, (0, num_padding), value=tokenizer.pad_token_id).view(-1, length)
    is_target_NT = pad(is_target_S, (0, num_padding), value=False).view(-1, length)
    lengths_N = torch.full((len(ids_NT),), length)
    lengths_N[-1:] -= num_padding
    # The mean loss of a batch without predictions would be NaN.
    kept_N = is_target_NT[:, 1:].any(dim=1)
    if not kept_N.any():
        raise DataError(
            f"{corpus.name} has no token that the loss counts; every client needs at least one, "
            "and with data.assistant_only_loss one of an assistant"
        )
    return Sequences(
        ids_NT=ids_NT[kept_N],
        is_target_NT=is_target_NT[kept_N],
        lengths_N=lengths_N[kept_N],
        bytes_V=token_bytes(tokenizer),
    )
