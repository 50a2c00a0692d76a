"""The checks of what a trunk answers, against the request that it answers.

Shapes: B sequences, T tokens, D hidden width, H heads, E width of a head. Every link calls
`check_reply` for every reply. Some numbers may be wrong nevertheless: only the trunk can compute
them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import BadTensor, NonFinite, ProtocolError, peer_text
from fedsplit.wire import messages as m
from fedsplit.wire.codec import NAMES
from fedsplit.wire.finite import refuse_non_finite
from fedsplit.wire.server_messages import ParametersReply, ParametersRequest
from fedsplit.wire.validation import check_id

MAX_COUNT = 2**63 - 1
"""The largest version, step or limit; such counts are kept as int64."""

MAX_HIDDEN = 1e15
"""The largest magnitude of a hidden state. Those of trained models reach 1e5.

The squares of larger ones, summed and multiplied by weights, may overflow float32 in the layers
above, which then give NaN: every sampled token would be the first one."""

# A million tensors, each with the largest norm that float32 holds.
_MAX_SQ_NORM = 1e6 * torch.finfo(torch.float32).max ** 2
_MAX_NAMES = 1024
_COUNTS = ("version", "barrier_version", "round", "step", "protocol", "sessions")
# The year 9999, the last one of Python's dates.
_MAX_TIME_S = 2.5e11
_AT_FAULT = "no weight of this client has changed; the trunk has diverged, or its server is faulty"


def check_reply(request: m.Request[Any], reply: m.Reply) -> None:
    """Check the texts, counts, shapes, dtypes and values of a reply.

    Raises:
        ProtocolError: A text or a count is not legal, or what was asked for is missing.
        BadTensor: A tensor has another shape or dtype than the request's.
        NonFinite: A number or a tensor holds NaN, Inf, or more than any trunk computes.
    """
    kind: Any = type(reply)
    for name in _counts(kind):
        _check_count(name, getattr(reply, name))
    if limits := getattr(reply, "limits", None):
        for name in limits.__slots__:
            _check_count(name, getattr(limits, name))
    if check := _CHECKS.get(type(reply)):
        check(request, reply)


@cache
def _counts(kind: type) -> list[str]:
    return [each.name for each in fields(kind) if each.name in _COUNTS]


def _check_open(_: m.OpenRequest, reply: m.OpenReply) -> None:
    check_id("session", reply.session)
    check_id("server_instance_id", reply.server_instance_id)
    if reply.autocast not in ("", *m.AUTOCAST):
        raise _illegal("autocast", reply.autocast)


def _check_output(
    request: m.ForwardRequest | m.GenerateRequest, reply: m.ForwardReply | m.GenerateReply
) -> None:
    got_BTD, sent_BTD = reply.trunk_out_BTD, request.smashed_BTD
    B, T, D = sent_BTD.shape
    kept = min(T, getattr(request, "logits_to_keep", T))
    wanted = (sent_BTD.dtype, (B, kept, D))
    _check_like("trunk_out", (got_BTD.dtype, tuple(got_BTD.shape)), wanted)
    refuse_non_finite(got_BTD, "the trunk's answer trunk_out", _AT_FAULT, most=MAX_HIDDEN)


def _check_backward(request: m.BackwardRequest, reply: m.BackwardReply) -> None:
    grad_BTD, sq_norm = reply.grad_smashed_BTD, reply.trunk_sq_norm
    if request.want_grad != (grad_BTD is not None):
        raise ProtocolError(
            "the trunk answered a backward without grad_smashed, which was asked for"
            if request.want_grad
            else "the trunk answered a backward with grad_smashed, which was not asked for"
        )
    # In float16 an overflow is no fault: the loss scale falls, and the step is skipped.
    is_overflow = request.may_overflow and not math.isfinite(sq_norm)
    is_double = request.grad_trunk_out_BTD.dtype == torch.float64
    most = math.inf if is_double else _MAX_SQ_NORM
    if not is_overflow and not (0.0 <= sq_norm <= most and math.isfinite(sq_norm)):
        raise NonFinite(
            f"the trunk answered trunk_sq_norm={sq_norm:g}, which is no squared norm of gradients; "
            "nothing was changed; this batch's gradients overflow, the trunk has diverged, or its "
            "server is faulty"
        )
    if grad_BTD is not None:
        sent_BTD = request.grad_trunk_out_BTD
        wanted = (sent_BTD.dtype, tuple(sent_BTD.shape))
        _check_like("grad_smashed", (grad_BTD.dtype, tuple(grad_BTD.shape)), wanted)
        if not request.may_overflow:
            refuse_non_finite(grad_BTD, "the trunk's answer grad_smashed", _AT_FAULT)


def _check_generate(request: m.GenerateRequest, reply: m.GenerateReply) -> None:
    _check_output(request, reply)
    if reply.entries and not request.stateless:
        raise ProtocolError(
            "the trunk answered with keys and values, which only kv=client asks for"
        )
    sent = {entry.block: entry for entry in request.entries}
    blocks = sorted(entry.block for entry in reply.entries)
    # A trunk without keys and values refuses a stateless request.
    if request.stateless and (blocks != sorted(sent or set(blocks)) or not blocks):
        raise ProtocolError(
            f"the trunk answered with keys and values of blocks {blocks[:8]} to a request with "
            f"those of {sorted(sent)[:8]}; each block is needed once"
        )
    for entry in reply.entries:
        _check_count("block", entry.block)
        for name in ("keys_BHTE", "values_BHTE"):
            before = getattr(sent[entry.block], name) if sent else None
            _check_entry(f"{name} of block {entry.block}", getattr(entry, name), request, before)


def _check_entry(
    name: str, got_BHTE: Tensor, request: m.GenerateRequest, before_BHTE: Tensor | None
) -> None:
    B, T, _ = request.smashed_BTD.shape
    shape, dtype = tuple(got_BHTE.shape), request.smashed_BTD.dtype
    heads = shape[1::2] if before_BHTE is None else tuple(before_BHTE.shape[1::2])
    # A sliding window keeps fewer tokens than were sent.
    fits = len(shape) == 4 and shape[0] == B and shape[2] <= T and shape[1::2] == heads
    if not fits or got_BHTE.dtype != dtype:
        raise BadTensor(
            f"the trunk answered {name} {NAMES[got_BHTE.dtype]} {shape} to a request of {B} "
            f"sequences of {T} tokens in {NAMES[dtype]}"
        )
    refuse_non_finite(got_BHTE, f"the trunk's answer {name}", _AT_FAULT)


def _check_gradients(request: m.GradientsRequest, reply: m.GradientsReply) -> None:
    names = reply.names
    if len(names) != len(reply.gradients) or len(set(names)) != len(names):
        raise ProtocolError(
            f"the trunk answered {len(reply.gradients)} gradients with {len(set(names))} names; "
            "each needs one of its own"
        )
    if names and not request.tensors:
        raise ProtocolError("the trunk answered with gradients, and only norms were asked for")
    for name in (*names, *reply.norms):
        _check_text("the name of a gradient", name)
    # Infinities in float16 are for their reader to see.
    if any(norm < 0.0 for norm in reply.norms.values()):
        raise NonFinite(f"the trunk answered negative norms of gradients; {_AT_FAULT}")


def _check_training_state(_: m.TrainingStateRequest, reply: m.TrainingStateReply) -> None:
    if not 0.0 <= reply.lr < math.inf:
        raise _illegal("lr", reply.lr)


def _check_service_info(_: m.ServiceInfoRequest, reply: m.ServiceInfoReply) -> None:
    check_id("server_instance_id", reply.server_instance_id)
    check_id("model", reply.model)
    texts = {"family": reply.family, "blocks": reply.blocks}
    pairs = (*_flat("a budget", reply.budgets), *_flat("a version", reply.versions))
    for name, text in (*texts.items(), *pairs):
        _check_text(name, text)
    if not 0 <= reply.time_s < _MAX_TIME_S:
        raise _illegal("time_s", reply.time_s)
    if len(reply.served_model_names) + len(pairs) // 2 > _MAX_NAMES:
        raise ProtocolError(f"the server describes more than {_MAX_NAMES} trunks and limits")
    for name in reply.served_model_names:
        check_id("served_model_name", name)


def _check_parameters(_: ParametersRequest, reply: ParametersReply) -> None:
    check_id("server_instance_id", reply.server_instance_id)
    if len(reply.names) != len(reply.parameters) or len(set(reply.names)) != len(reply.names):
        raise ProtocolError(
            f"the leader answered {len(reply.parameters)} parameters with "
            f"{len(set(reply.names))} names; each needs one of its own"
        )


def _flat(name: str, texts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, text) for pair in texts.items() for text in pair]


def _check_like(
    name: str, got: tuple[torch.dtype, tuple[int, ...]], wanted: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    """Compare dtype and shape."""
    if got != wanted:
        raise BadTensor(
            f"the trunk answered {name} {NAMES[got[0]]} {got[1]} to a request of "
            f"{NAMES[wanted[0]]} {wanted[1]}"
        )


def _check_count(name: str, value: int) -> None:
    if not 0 <= value <= MAX_COUNT:
        raise _illegal(name, value)


def _check_text(name: str, text: str) -> None:
    if peer_text(text) != text:
        raise _illegal(name, text)


def _illegal(name: str, value: object) -> ProtocolError:
    return ProtocolError(
        f"the trunk answered {name}={peer_text(str(value))[:64]!r}, which is not legal"
    )


_CHECKS: dict[type, Callable[[Any, Any], None]] = {
    m.OpenReply: _check_open,
    m.ForwardReply: _check_output,
    m.BackwardReply: _check_backward,
    m.GenerateReply: _check_generate,
    m.GradientsReply: _check_gradients,
    m.TrainingStateReply: _check_training_state,
    m.ServiceInfoReply: _check_service_info,
    ParametersReply: _check_parameters,
}
