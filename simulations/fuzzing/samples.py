"""A legal message of every class, and messages of which some fields have odd values.

Shapes: B sequences, T tokens, D hidden width, H heads, E width of a head.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsplit.model.identity import model_fingerprint
from fedsplit.model.stage import ClientPart
from fedsplit.spec import RunSpec
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s
from fedsplit.wire.codec import traveling
from simulations.fuzzing import odd

M = TypeVar("M")

_AUTOCAST = ("", "", "", *m.AUTOCAST)
_CODECS = ("none", "none", "bf16", "int8", "int4", "topk:0.5", "huffman:0.5", "lowrank:0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Legal messages of one client to one trunk."""

    client: str
    model: str
    config: str
    limits: m.Limits

    @staticmethod
    def of(part: ClientPart, run: RunSpec, limits: m.Limits, client: str) -> "Samples":
        """Return the samples of a client with this model and run."""
        model = model_fingerprint(part.config, run.split)
        return Samples(client=client, model=model, config=run.fingerprint, limits=limits)

    def open(self, rng: random.Random) -> m.OpenRequest:
        """A session of any purpose."""
        purpose = rng.randrange(3)
        return m.OpenRequest(
            protocol=m.PROTOCOL,
            client=self.client,
            model=self.model,
            config=self.config if purpose == 0 else "",
            hidden_size=self.limits.hidden_size,
            round=rng.choice((0, 1, 3)),
            training=purpose == 0,
            generating=purpose == 1,
            cache_tokens=rng.choice((0, 0, 8, 64)),
        )

    def forward(self, rng: random.Random, session: str = "s", call: int = 0) -> m.ForwardRequest:
        """A forward, which trains or evaluates."""
        smashed_BTD = self.hidden(rng)
        B, T, _ = smashed_BTD.shape
        return m.ForwardRequest(
            session=session,
            call=call,
            training=rng.random() < 0.5,
            smashed_BTD=smashed_BTD,
            attention_mask_BT=_mask(rng, B, T),
            position_ids_BT=_positions(rng, B, T),
            codec=rng.choice(_CODECS),
            other_mode=rng.random() < 0.2,
            autocast=rng.choice(_AUTOCAST),
        )

    def backward(self, rng: random.Random, session: str = "s", call: int = 0) -> m.BackwardRequest:
        """A backward, which need not fit the forward."""
        return m.BackwardRequest(
            session=session,
            call=call,
            want_grad=rng.random() < 0.7,
            grad_trunk_out_BTD=self.hidden(rng) / 100,
            codec=rng.choice(_CODECS),
        )

    def step(self, rng: random.Random, session: str = "s", call: int = 0) -> m.StepRequest:
        """A step."""
        return m.StepRequest(
            session=session,
            call=call,
            step=rng.choice((0, 0, 1, 5)),
            num_tokens=rng.choice((1, 3, 8)),
            client_sq_norm=rng.choice((0.0, 0.5, 2.0)),
            loss_scale=rng.choice((1.0, 1.0, 1024.0)),
        )

    def generate(self, rng: random.Random, session: str = "s", call: int = 0) -> m.GenerateRequest:
        """The next tokens of a sequence, or with its whole cache."""
        smashed_BTD = self.hidden(rng)
        B, T, D = smashed_BTD.shape
        past, is_stateless = rng.choice((0, 0, 1, 3, 8)), rng.random() < 0.2
        kv = torch.ones(B, 2, past, D // 2)
        # The trunk has the second block of the model.
        entries = (m.KVCacheEntry(block=1, keys_BHTE=kv, values_BHTE=kv),) if past else ()
        return m.GenerateRequest(
            session=session,
            call=call,
            past=past,
            logits_to_keep=rng.randint(1, T),
            smashed_BTD=smashed_BTD,
            rows_B=torch.arange(B) if past and rng.random() < 0.3 else None,
            attention_mask_BT=_mask(rng, B, past + T if is_stateless else T),
            position_ids_BT=_positions(rng, B, T),
            record_past=rng.random() < 0.1,
            stateless=is_stateless,
            entries=entries if is_stateless else (),
            autocast=rng.choice(_AUTOCAST),
            source=session if past and not is_stateless and rng.random() < 0.1 else "",
            source_call=rng.choice((0, call)),
        )

    def small(self, rng: random.Random, session: str = "s") -> m.Request[Any]:
        """A request without hidden states."""
        return rng.choice(
            (
                m.CloseRequest(session=session),
                m.GradientsRequest(session=session, tensors=rng.random() < 0.5),
                m.TrainingStateRequest(session=session),
                m.ServiceInfoRequest(),
                # They are for the servers of a run, and come here from a client.
                s.ParametersRequest(follower="f", server_instance_id="", version=0, wait_s=0.1),
                s.WorkReportRequest(
                    session=session, positions=5, clipped=0, refused=0, quarantines=0
                ),
                s.ContributeRequest(
                    session=session,
                    call=0,
                    step=0,
                    num_tokens=1,
                    client_sq_norm=0.0,
                    loss_scale=1.0,
                    num_positions=8,
                    barrier_version=0,
                    names=("a",),
                    gradients=(torch.ones(2, 3),),
                ),
            )
        )

    def request(self, rng: random.Random, session: str = "s", call: int = 0) -> m.Request[Any]:
        """Any request."""
        make: Any = rng.choice((self.forward, self.backward, self.step, self.generate))
        match rng.randrange(6):
            case 0:
                return self.open(rng)
            case 1:
                return self.small(rng, session)
            case _:
                request: m.Request[Any] = make(rng, session, call)
                return request

    def reply(self, rng: random.Random) -> m.Reply:
        """Any reply."""
        out_BTD = self.hidden(rng)
        kv = m.KVCacheEntry(block=1, keys_BHTE=out_BTD[:, None], values_BHTE=out_BTD[:, None])
        return rng.choice(
            (
                m.OpenReply(
                    session="s", server_instance_id="i", version=3, limits=self.limits, autocast=""
                ),
                m.ForwardReply(trunk_out_BTD=out_BTD, version=3, codec=rng.choice(_CODECS)),
                m.BackwardReply(grad_smashed_BTD=out_BTD, trunk_sq_norm=1.5),
                m.StepReply(version=4),
                m.GenerateReply(trunk_out_BTD=out_BTD, entries=(kv,)),
                m.CloseReply(),
                m.GradientsReply(norms={"a": 1.0}, names=("a",), gradients=(out_BTD,)),
                s.WorkReportReply(),
                s.ParametersReply(
                    server_instance_id="i",
                    version=1,
                    barrier_version=1,
                    names=("a",),
                    parameters=(out_BTD,),
                ),
                m.TrainingStateReply(round=1, step=2, lr=0.1, version=3),
                m.ServiceInfoReply(
                    protocol=m.PROTOCOL,
                    server_instance_id="i",
                    model=self.model,
                    family="gpt2",
                    blocks="1/1/1",
                    version=0,
                    sessions=1,
                    limits=self.limits,
                    served_model_names=("a", "b"),
                    budgets={"limits.sessions": "1 of 2"},
                    versions={"fedsplit": "0.1.0"},
                    time_s=1e9,
                ),
            )
        )

    def hidden(self, rng: random.Random) -> Tensor:
        """Hidden states of one or two sequences of up to eight tokens."""
        B, T, D = rng.choice((1, 2)), rng.choice((1, 2, 3, 8)), self.limits.hidden_size
        first = rng.uniform(-1, 1)
        return torch.linspace(first, first + 1, B * T * D).view(B, T, D)


def mutated(message: M, rng: random.Random) -> M:
    """Return a message in which one to three fields have odd values."""
    of: Any = message
    chosen = traveling(of)
    if not chosen:
        return message
    picked = rng.sample(chosen, min(len(chosen), rng.choice((1, 1, 2, 3))))
    changes = {each.name: _odd(rng, each.type, getattr(message, each.name)) for each in picked}
    result: M = replace(of, **changes)
    return result


def _odd(rng: random.Random, kind: Any, value: Any) -> Any:
    if draw := _DRAWS.get(kind):
        return draw(rng)
    if kind is Tensor or kind == Tensor | None:
        return None if kind is not Tensor and rng.random() < 0.2 else odd.tensor(rng, value)
    if kind == tuple[Tensor, ...]:
        return tuple(odd.tensor(rng, None) for _ in range(rng.randint(0, 3)))
    if kind is m.Limits:
        return mutated(value, rng)
    if value and rng.random() < 0.5:
        return value * rng.choice((0, 2, 5))
    kv = torch.ones(1, 2, 1, 8)
    entry = m.KVCacheEntry(block=odd.integer(rng), keys_BHTE=kv, values_BHTE=kv)
    return tuple(mutated(entry, rng) for _ in range(rng.randint(0, 3)))


_DRAWS: dict[Any, Callable[[random.Random], Any]] = {
    **odd.DRAWS,
    int: odd.integer,  # the fields of protobuf have no sign
    tuple[str, ...]: lambda rng: tuple(odd.some(rng, odd.text)),
}


def _mask(rng: random.Random, B: int, T: int) -> Tensor | None:
    if rng.random() < 0.5:
        return None
    mask_BT = torch.ones(B, T, dtype=torch.int64)
    mask_BT[0, 0] = rng.choice((0, 1))
    return mask_BT


def _positions(rng: random.Random, B: int, T: int) -> Tensor | None:
    return torch.arange(T).expand(B, T) if rng.random() < 0.3 else None


def equal(one: Any, other: Any) -> bool:
    """Return whether two messages are equal, with all bits of their tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        # Compared as bytes, since NaN is not equal to itself.
        return same and bytes_of(one) == bytes_of(other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if type(one) is type(other) and hasattr(one, "__dataclass_fields__"):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    raw: bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return raw
