"""What public text shows of the rows at the cut: the statistics that a shield works with.

Shapes: B sequences, T tokens, D hidden width.
"""

import inspect
import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig, TokenizersBackend

from fedsplit.client.privacy import PublicRows
from fedsplit.data import load_corpus, tokenize
from fedsplit.data.batches import whole_rows
from fedsplit.errors import DataError
from fedsplit.model import ClientPart, connect
from fedsplit.spec import DataSpec

_ROWS_PER_COORDINATE = 4
_LEAST_ROWS = 1024
_GRADIENT_ROWS = 256


class _Reached(Exception):  # noqa: N818  # it ends a forward at the cut, and is no error
    """Carries the rows at the cut out of a forward."""

    def __init__(self, rows_BTD: Tensor) -> None:
        super().__init__()
        self.rows_BTD = rows_BTD


def public_ids(
    path: str, tokens: int, tokenizer: TokenizersBackend | None, config: PretrainedConfig
) -> Tensor:
    """Return the token ids [B, T] of public text, or random ones where there is none.

    Args:
        path: A file of text; empty for none.
        tokens: The length of a sequence.
        tokenizer: The model's tokenizer.
        config: The model's config.

    Raises:
        DataError: The text cannot be used.
    """
    if not path:
        return random_tokens(config, tokens)
    assert tokenizer is not None, "privacy is for tasks that read text"
    data = DataSpec(kind="text", path=path, sequence_length=tokens)
    try:
        corpus = load_corpus(data)
        examples = tokenize(corpus, tokenizer, data)
        return whole_rows(examples, corpus.name, num_sequences(config, tokens), tokens)
    except DataError as exc:
        raise DataError(f"privacy.public={path}, the public text, cannot be used: {exc}") from exc


def num_sequences(config: PretrainedConfig, tokens: int) -> int:
    """Return the number of public sequences of so many tokens that the statistics need."""
    hidden_size: int = config.hidden_size
    return math.ceil(max(_LEAST_ROWS, _ROWS_PER_COORDINATE * hidden_size) / tokens)


def random_tokens(config: PretrainedConfig, tokens: int) -> Tensor:
    """Return ids [B, T] that stand for public text where there is none: any token anywhere."""
    shape = num_sequences(config, tokens), tokens
    # Nothing about them is secret, and the same ones give the same statistics again.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=generator)


def public_rows(model: ClientPart, ids_BT: Tensor) -> PublicRows:
    """Return the statistics of the rows at the cut of a client's model, on the CPU.

    The model is connected to no trunk afterwards.

    Args:
        model: The client's model.
        ids_BT: The token ids of public text.
    """

    def carry(rows_BTD: Tensor, **_: Any) -> NoReturn:
        raise _Reached(rows_BTD)

    was_training = model.training
    model.train(False)
    connect(model, carry)
    rows: list[Tensor] = []
    with torch.no_grad():
        # In pieces, as the attention of all sequences at once may be large.
        for some_BT in ids_BT.split(max(1, _GRADIENT_ROWS // ids_BT.shape[1])):
            try:
                model(input_ids=some_BT.to(model.device), **_no_cache(model))
            except _Reached as reached:
                rows.append(reached.rows_BTD.float().cpu().flatten(0, 1))
    model.train(was_training)
    return PublicRows.of(torch.cat(rows))


def gradient_radius(model: ClientPart, ids_BT: Tensor, *, is_classifier: bool) -> float:
    """Return the median norm of the gradient of one token's loss, by a row of the trunk's output.

    The trunk's output for public text is not known, so its input stands for it. The model is
    connected to no trunk afterwards.

    Args:
        model: The client's model.
        ids_BT: The token ids of public text.
        is_classifier: Whether it has one label for each sequence.
    """
    rows: list[Tensor] = []

    def carry(rows_BTD: Tensor, **_: Any) -> Tensor:
        rows.append(rows_BTD.detach().requires_grad_())
        return rows[0]

    was_training = model.training
    model.train(False)
    connect(model, carry)
    some_BT = ids_BT[: max(1, _GRADIENT_ROWS // ids_BT.shape[1])].to(model.device)
    B, T = some_BT.shape
    labels = some_BT.new_zeros(B) if is_classifier else some_BT
    with torch.enable_grad():
        loss = model(input_ids=some_BT, labels=labels, **_no_cache(model)).loss
        # The loss is a mean, and a step's gradient is scaled by the tokens of all its batches.
        (grad_BTD,) = torch.autograd.grad(loss * (B if is_classifier else B * (T - 1)), rows[0])
    model.train(was_training)
    # A classifier may read one row of a sequence; the others have no gradient.
    norms_N = grad_BTD.float().norm(dim=-1).flatten()
    return float(norms_N[norms_N > 0].median())


def _no_cache(model: ClientPart) -> dict[str, bool]:
    # Most families would create a cache, and encoders do not know one.
    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
