"""What leaves a client in one step and one text, by message: captured at the trunk's service."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.audit.scene import Scene
from fedsplit.client.privacy import Shield
from fedsplit.client.remote import RemoteTrunk
from fedsplit.link import LocalLink
from fedsplit.model import connect
from fedsplit.model.describe import shared
from fedsplit.model.lora import trainable
from fedsplit.model.stage import TrunkPart
from fedsplit.optimization import PartOptimizer
from fedsplit.spec import PolicySpec, RunSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from fedsplit.wire.codec import traveling

NEW_TOKENS = 8
"""The most tokens that are generated."""

Shielding = Callable[[RemoteTrunk], Shield]
"""Puts a shield around a trunk."""

NOT_AUDITED = "not audited"
COVERED = {
    "ForwardRequest.smashed_BTD": "text (search, linear)",
    "ForwardRequest.attention_mask_BT": "lengths, in the clear",
    "ForwardRequest.position_ids_BT": "lengths, in the clear",
    "BackwardRequest.grad_trunk_out_BTD": "labels",
    "GenerateRequest.smashed_BTD": "generation (search)",
    "GenerateRequest.attention_mask_BT": "lengths, in the clear",
    "GenerateRequest.position_ids_BT": "lengths, in the clear",
    "client weights": "words; known to every attack",
}
"""The attack that covers a tensor, by message and field."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the server received.

    Attributes:
        requests: All messages of the stream, as the server decodes them.
        loss: The loss of the step, in nats per token.
        text_BT: The prompt and the text that was generated after it.
        client_weights: The names of the tensors that go to the server after the round.
        embedding_change_VD: What the client's step changes of its embedding.
    """

    requests: list[m.Request[Any]] = field(default_factory=list)
    loss: float = 0.0
    text_BT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    client_weights: list[str] = field(default_factory=list)
    embedding_change_VD: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def tensors(self, message: type[m.Request[Any]], name: str) -> list[Tensor]:
        """Return a field of all messages of a type."""
        return [getattr(each, name) for each in self.requests if isinstance(each, message)]

    def census(self) -> dict[str, str]:
        """Return the attack that covers each kind of tensor that left, or `NOT_AUDITED`."""
        found = {
            f"{type(request).__name__}.{each.name}"
            for request in self.requests
            for each in traveling(type(request))
            if _has_tensor(getattr(request, each.name))
        }
        found |= {"client weights"} if self.client_weights else set()
        return {name: COVERED.get(name, NOT_AUDITED) for name in sorted(found)}


def _has_tensor(value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return any(isinstance(each, Tensor | m.KVCacheEntry) for each in values)


class _Recorded(TrunkService):
    """A service that records the requests that it is asked, as they were decoded."""

    def __init__(self, trunk: TrunkPart, run: RunSpec) -> None:
        super().__init__(trunk, run)
        self.requests: list[m.Request[Any]] = []

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Record a request, and answer it."""
        self.requests.append(request)
        return super().handle(request, token)


def seen(
    scene: Scene,
    ids_BT: Tensor,
    *,
    more_blocks: int = 0,
    shielding: Shielding | None = None,
    **wire: Any,
) -> Seen:
    """Train a step on a text, generate another one, and return what the server received.

    Args:
        scene: The run.
        ids_BT: The text.
        more_blocks: The blocks by which the bottom is deeper than in the run.
        shielding: Puts a shield between the client and the trunk.
        wire: Settings of `wire` that replace those of the run.
    """
    found, parts = Seen(), scene.parts(more_blocks)
    run = _alone(scene.run, ids_BT, more_blocks, wire)
    client = parts.client.train()
    optimizer = PartOptimizer(trainable(client), run.train)
    service = _Recorded(parts.trunk, run)
    with service:
        found.requests = service.requests
        link = LocalLink(service, service.admit("client-0"))
        trunk = RemoteTrunk(link, client, run, client="client-0")
        connect(client, shielding(trunk) if shielding else trunk, trunk.new_cache)
        with trunk.session():
            loss = client(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            loss.backward()
            if found.tensors(m.BackwardRequest, "call"):
                trunk.step(step=0, num_tokens=ids_BT.numel(), client_sq_norm=0.0)
        found.loss = float(loss.detach())
        # No longer than the text of the step, since a model has so many positions.
        new_tokens = min(NEW_TOKENS, ids_BT.shape[1] - 1)
        prompt_BT = ids_BT[:, :-new_tokens]
        found.text_BT = client.eval().generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        trunk.end_generations()
    found.client_weights = list(shared(client, scene.run))
    # Last, since the texts above are those of the weights before the step.
    embedding: Any = client.get_input_embeddings()
    before_VD = embedding.weight.detach().clone()
    optimizer.step(0, 1.0)
    found.embedding_change_VD = embedding.weight.detach() - before_VD
    return found


def _alone(run: RunSpec, ids_BT: Tensor, more_blocks: int, wire: dict[str, Any]) -> RunSpec:
    """Return the run for one client and this text, without what a single step has no use for."""
    B, T = ids_BT.shape
    split = replace(run.split, bottom=run.split.bottom + more_blocks)
    return replace(
        run,
        clients=1,
        split=split,
        policy=PolicySpec(),
        data=replace(run.data, sequence_length=max(T, run.data.sequence_length)),
        train=replace(run.train, batch_size=B, accumulation=1, micro_batches=1),
        wire=replace(run.wire, history_bytes=0, **wire),
    )
