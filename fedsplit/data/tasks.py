"""Tasks: a client's shard as what the model of the run's task takes.

Shapes: N rows, T tokens of a text, C channels, H height and W width of an image.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fedsplit.data.batches import Examples, Labelled
from fedsplit.data.corpora import Corpus
from fedsplit.data.tokenizing import tokenize
from fedsplit.errors import DataError
from fedsplit.spec import DataSpec


def examples(
    corpus: Corpus,
    data: DataSpec,
    tokenizer: PreTrainedTokenizerFast | None,
    labels: tuple[str, ...],
) -> Examples:
    """The rows that a model of the run's task trains on.

    Without labels, sequences for language modelling. With labels a row per document: a text, cut
    or padded at the right to `data.sequence_length` tokens of which the special ones are the
    tokenizer's own, or, without a tokenizer, a square gray image of values from -1 to 1, as
    Hugging Face's image processors give them.

    Args:
        corpus: One client's shard.
        data: How long texts are.
        tokenizer: The model's; None for images.
        labels: All classes of the run in the order of their numbers, `()` without classes.

    Raises:
        DataError: The corpus has no document, or one of a class that is not among `labels`.
    """
    if not corpus.documents:
        raise DataError(f"{corpus.name} has no documents; every client needs at least one")
    if not labels:
        assert tokenizer is not None, "language models have one"
        return tokenize(corpus, tokenizer, data.sequence_length)
    inputs = _images(corpus) if tokenizer is None else _texts(corpus, data, tokenizer)
    return Labelled(inputs=inputs, labels_N=_classes(corpus, labels))


def _texts(corpus: Corpus, data: DataSpec, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    encoded = tokenizer(
        [document.text for document in corpus.documents],
        truncation=True,
        padding="max_length",
        max_length=data.sequence_length,
        padding_side="right",  # positions count from the left
        split_special_tokens=True,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def _images(corpus: Corpus) -> dict[str, Tensor]:
    pixels_NP = torch.tensor([document.pixels for document in corpus.documents])
    side = math.isqrt(pixels_NP.shape[1])
    return {"pixel_values": pixels_NP.view(-1, 1, side, side) * 2 - 1}


def _classes(corpus: Corpus, labels: tuple[str, ...]) -> Tensor:
    number = {label: i for i, label in enumerate(labels)}
    strangers = sorted({document.label for document in corpus.documents} - set(labels))
    if strangers:
        raise DataError(
            f"{corpus.name} has documents of class {strangers[0]!r}, but the classes of this run "
            f"are {', '.join(labels)}; all clients need the classes that the server knows"
        )
    return torch.tensor([number[document.label] for document in corpus.documents])
