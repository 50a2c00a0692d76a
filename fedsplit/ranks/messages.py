"""The bytes of what rank 0 sends to the other ranks: a JSON header, and the frames of requests.

Requests are the frames of the wire, without a codec: rank 0 has decoded them. Nothing is pickled.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.transport.frames import Reader, to_frames
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.turns import Message, Order, Outcome, Turn

_ANY_SIZE = 1 << 62
"""Rank 0 has checked the sizes of what clients sent."""


def written(message: Message) -> tuple[bytes, bytes]:
    """Return the header and the frames of a message; its tensors follow (see `tensors_of`)."""
    if isinstance(message, Turn):
        frames = [_frame(call) for call in message.calls]
        calls = [_fields(each, len(f)) for each, f in zip(message.calls, frames, strict=True)]
        outcome = message.outcome.steps, message.outcome.norm, message.outcome.refused
        times = message.now, message.pass_s
        header: Any = {"times": times, "outcome": outcome, "calls": calls}
        return json.dumps(header).encode(), b"".join(frames)
    if isinstance(message, Order):
        return json.dumps(_order(message)).encode(), b""
    return json.dumps(message).encode(), b""


def read(header: bytes, frames: bytes) -> Message:
    """Return the message of a header and frames; its tensors have no values yet."""
    found = json.loads(header)
    if not isinstance(found, dict):
        return bool(found) if found is not None else None
    if "order" in found:
        return _read_order(found)
    steps, norm, refused = found["outcome"]
    now, pass_s = found["times"]
    return Turn(
        now=now,
        pass_s=pass_s,
        calls=list(_calls(found["calls"], frames)),
        outcome=Outcome(steps=steps, norm=norm, refused=refused),
    )


def tensors_of(message: Message) -> list[Tensor]:
    """Return the tensors of a message: those of the states of its orders."""
    found = [call.request for call in message.calls] if isinstance(message, Turn) else [message]
    states = [each.state or {} for each in found if isinstance(each, Order)]
    return [tensor for state in states for tensor in state.values()]


def _fields(call: Call, size: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "kind": call.kind.name,
        "client": call.client,
        "session": call.session,
        "round": call.round,
        "size": size,
    }
    if isinstance(call.request, Order):
        fields |= _order(call.request)
    return fields


def _frame(call: Call) -> bytes:
    if call.request is None or isinstance(call.request, Order):
        return b""
    request = call.request
    if hasattr(request, "codec"):
        # The codec has done its work, and a second time might change the values again.
        request = replace(request, codec="none")
    (frame,) = to_frames(request, _ANY_SIZE)
    return frame


def _calls(found: list[dict[str, Any]], frames: bytes) -> Iterator[Call]:
    view, at = memoryview(frames), 0
    for fields in found:
        size = fields["size"]
        request: Any = None
        if "order" in fields:
            request = _read_order(fields)
        elif size:
            request = Reader(_ANY_SIZE, _ANY_SIZE).only(bytes(view[at : at + size]))
        at += size
        yield Call(
            kind=Kind[fields["kind"]],
            client=fields["client"],
            session=fields["session"],
            round=fields["round"],
            request=request,
        )


def _order(order: Order) -> dict[str, Any]:
    state = None
    if order.state is not None:
        state = {k: (str(t.dtype).partition(".")[2], list(t.shape)) for k, t in order.state.items()}
    return {"order": order.name, "arguments": order.arguments, "state": state}


def _read_order(found: Mapping[str, Any]) -> Order:
    state: dict[str, Tensor] | None = None
    if found["state"] is not None:
        state = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in found["state"].items()
        }
    return Order(found["order"], tuple(found["arguments"]), state)
