"""The checks of requests against the limits and shapes of a session.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections.abc import Callable, Collection
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import BadTensor, ProtocolError, TooLarge
from fedsplit.spec import NAME_PATTERN
from fedsplit.wire.codec import NAMES
from fedsplit.wire.messages import (
    AUTOCAST,
    BackwardRequest,
    ForwardRequest,
    GenerateRequest,
    Limits,
    Request,
)
from fedsplit.wire.server_messages import ContributeRequest

_IDS = ("session", "client", "model", "follower")
_NAMES_OR_NONE = (
    "config",
    "served_model_name",
    "last_instance_id",
    "server_instance_id",
    "source",
)
_INTEGERS = (torch.int64, torch.int32)
_OF_MASKS = (*_INTEGERS, torch.bool)
_LEAST = {
    "call": 0,
    "step": 0,
    "round": 0,
    "num_tokens": 1,
    "client_sq_norm": 0,
    "loss_scale": 1,
    "past": 0,
    "logits_to_keep": 1,
    "cache_tokens": 0,
    "calls_ago": 0,
    "source_call": 0,
    "num_positions": 1,
    "wait_s": 0,
}


def check_request(request: Request[Any], limits: Limits) -> None:
    """Check the ids, counts and shapes of a request.

    Raises:
        ProtocolError: An id is no legal name, or a count is too small.
        BadTensor: A tensor has the wrong rank, dtype or width, or does not fit the others.
        TooLarge: A tensor has more sequences or tokens than the limits allow.
    """
    kind: Any = type(request)
    ids, names_or_none, counts = _checked(kind)
    for name in ids:
        check_id(name, getattr(request, name))
    for name in names_or_none:
        check_id(name, getattr(request, name) or "-")
    for name, least in counts:
        value = getattr(request, name)
        # Written so that NaN fails.
        if not value >= least:
            raise ProtocolError(f"{name}={value} must be at least {least}")
    autocast = getattr(request, "autocast", "")
    if autocast not in ("", *AUTOCAST):
        raise ProtocolError(f"autocast={autocast[:64]!r} must be {' or '.join(AUTOCAST)}, or empty")
    if check := _SHAPES.get(type(request)):
        check(request, limits)


@cache
def _checked(kind: type) -> tuple[list[str], list[str], list[tuple[str, float]]]:
    """The fields of a kind of request to check: ids, names or none, and counts with the least."""
    of = {each.name for each in fields(kind)}
    counts: list[tuple[str, float]] = [(n, least) for n, least in _LEAST.items() if n in of]
    return [n for n in _IDS if n in of], [n for n in _NAMES_OR_NONE if n in of], counts


def check_id(name: str, value: str) -> None:
    """Check that a peer's text is an id: a session, a client, a fingerprint.

    Raises:
        ProtocolError: It is not; the text has at most 64 characters of it.
    """
    if not NAME_PATTERN.fullmatch(value):
        raise ProtocolError(f"{name}={value[:64]!r} must be 1 to 64 of A-Z a-z 0-9 _ -")


def _check_forward(request: ForwardRequest, limits: Limits) -> None:
    _check_width("smashed", tuple(request.smashed_BTD.shape), request.smashed_BTD.dtype, limits)
    B, T, _ = request.smashed_BTD.shape
    if request.training:
        _check_trained("smashed", B, T, limits)
    else:
        _check_evaluated(B, T, limits)
    if (mask_BT := request.attention_mask_BT) is not None:
        _check_integers("attention_mask", mask_BT, _OF_MASKS)
        if tuple(mask_BT.shape) != (B, T):
            raise BadTensor(
                f"attention_mask of shape {tuple(mask_BT.shape)} does not fit {B} sequences "
                f"of {T} tokens; only a session that generates may have cached tokens"
            )
    if (positions_BT := request.position_ids_BT) is not None:
        _check_integers("position_ids", positions_BT)
        if tuple(positions_BT.shape) != (B, T):
            raise BadTensor(
                f"position_ids of shape {tuple(positions_BT.shape)} do not fit {B} sequences "
                f"of {T} tokens"
            )
    if request.calls_ago > request.call:
        raise ProtocolError(
            f"calls_ago={request.calls_ago} is before the first call; call {request.call} can "
            "repeat an earlier one"
        )
    if request.bases_B is not None or request.references:
        _check_bases(request)


def _check_bases(request: ForwardRequest) -> None:
    shape = request.smashed_BTD.shape
    if (bases_B := request.bases_B) is None:
        if request.references:
            raise ProtocolError(
                "a forward without bases_B came with references; send both or neither"
            )
        return
    if not request.training:
        raise ProtocolError(
            "a forward that does not train came with bases_B; send its hidden states whole"
        )
    if bases_B.dtype != torch.int64 or tuple(bases_B.shape) != (shape[0],) or bases_B.min() < -1:
        raise BadTensor(
            f"bases_B is {NAMES[bases_B.dtype]} of shape {tuple(bases_B.shape)}; a name, 0 or -1 "
            f"for each of {shape[0]} sequences is needed, as int64"
        )
    references = request.references
    if len(references) not in (0, 2) or any(
        each.dtype != torch.bfloat16 or each.shape != shape for each in references
    ):
        raise BadTensor(
            f"references must be two tensors of shape {tuple(shape)} in bfloat16, or none"
        )


def _check_backward(request: BackwardRequest, limits: Limits) -> None:
    _check_width(
        "grad_trunk_out",
        tuple(request.grad_trunk_out_BTD.shape),
        request.grad_trunk_out_BTD.dtype,
        limits,
    )
    B, T, _ = request.grad_trunk_out_BTD.shape
    _check_trained("grad_trunk_out", B, T, limits)


def _check_generate(request: GenerateRequest, limits: Limits) -> None:
    _check_width("smashed", tuple(request.smashed_BTD.shape), request.smashed_BTD.dtype, limits)
    B, T, _ = request.smashed_BTD.shape
    num_tokens = B * (request.past + T)
    if num_tokens > limits.session_tokens:
        raise TooLarge(
            f"{B} sequences of {request.past} + {T} tokens are {num_tokens}; a session of this "
            f"trunk holds at most {limits.session_tokens}; raise generation.session_tokens at the "
            "trunk"
        )
    if request.logits_to_keep > T:
        raise ProtocolError(
            f"logits_to_keep={request.logits_to_keep} must be at most {T}, the number of tokens"
        )
    if request.source and (request.stateless or not request.past):
        raise ProtocolError(
            f"a request with past={request.past} and stateless={request.stateless} names a source; "
            "a copy needs at least one token and a cache at the trunk"
        )
    if (rows_B := request.rows_B) is not None:
        if rows_B.dtype not in _INTEGERS or tuple(rows_B.shape) != (B,):
            raise BadTensor(
                f"rows_B is {NAMES[rows_B.dtype]} of shape {tuple(rows_B.shape)}; one integer for "
                f"each of {B} sequences is needed"
            )
    masked = request.past + T if request.stateless else T
    for name, tensor_BT, tokens, dtypes in (
        ("attention_mask", request.attention_mask_BT, masked, _OF_MASKS),
        ("position_ids", request.position_ids_BT, T, _INTEGERS),
    ):
        if tensor_BT is not None:
            _check_integers(name, tensor_BT, dtypes)
            if tuple(tensor_BT.shape) != (B, tokens):
                raise BadTensor(
                    f"{name} of shape {tuple(tensor_BT.shape)} does not fit {B} sequences of "
                    f"{tokens} tokens"
                )
    for entry in request.entries:
        for name in ("keys_BHTE", "values_BHTE"):
            shape = tuple(getattr(entry, name).shape)
            if len(shape) != 4 or shape[0] != B or shape[2] > request.past:
                raise BadTensor(
                    f"{name} of block {entry.block} has shape {shape}; {B} sequences of at most "
                    f"{request.past} tokens are needed"
                )


def _check_contribute(request: ContributeRequest, limits: Limits) -> None:
    if len(set(request.names)) != len(request.gradients) or len(request.names) != len(
        request.gradients
    ):
        raise ProtocolError(
            f"{len(request.gradients)} gradients came with {len(set(request.names))} names; each "
            "needs one of its own"
        )


def _check_trained(name: str, B: int, T: int, limits: Limits) -> None:
    if B > limits.max_rows or T > limits.max_tokens:
        raise TooLarge(
            f"{name} has {B} sequences of {T} tokens; the trunk takes at most "
            f"{limits.max_rows} of {limits.max_tokens}; raise train.batch_size or "
            "data.sequence_length at both sides"
        )


def _check_evaluated(B: int, T: int, limits: Limits) -> None:
    """Check a forward that keeps no graph, so that only its number of tokens counts."""
    most = max(limits.session_tokens, limits.max_rows * limits.max_tokens)
    if B * T > most:
        raise TooLarge(
            f"{B} sequences of {T} tokens are {B * T}; a forward without a backward may have at "
            f"most {most}; send fewer at a time, or raise generation.session_tokens at the trunk"
        )


def _check_width(name: str, shape: tuple[int, ...], dtype: torch.dtype, limits: Limits) -> None:
    if len(shape) != 3 or shape[2] != limits.hidden_size:
        raise BadTensor(
            f"{name} has shape {shape}; (sequences, tokens, {limits.hidden_size}) is needed, since "
            f"the trunk's hidden size is {limits.hidden_size}"
        )
    if not dtype.is_floating_point:
        raise BadTensor(f"{name} is {NAMES[dtype]}; a float dtype is needed")


def _check_integers(
    name: str, tensor_BT: Tensor, dtypes: Collection[torch.dtype] = _INTEGERS
) -> None:
    # Families compute with positions and index with them, which torch does not do with bools.
    if tensor_BT.dtype not in dtypes or tensor_BT.dim() != 2:
        raise BadTensor(
            f"{name} is {NAMES[tensor_BT.dtype]} of shape {tuple(tensor_BT.shape)}; "
            "integers of shape (sequences, tokens) are needed"
        )


_SHAPES: dict[type, Callable[[Any, Limits], None]] = {
    ForwardRequest: _check_forward,
    BackwardRequest: _check_backward,
    GenerateRequest: _check_generate,
    ContributeRequest: _check_contribute,
}
