"""A trunk that generates, its clients, and the unsplit model that judges their tokens."""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.link import Link, LocalLink
from fedsplit.model import ClientPart, SplitModel, TrunkPart, connect, split_model
from fedsplit.spec import GenerationSpec, LimitsSpec, PolicySpec, RunSpec, SplitSpec, WireSpec
from fedsplit.trunk.service import TrunkService
from simulations.families import random_model
from simulations.tiny import tiny_config

R = TypeVar("R")

SPLIT = "1/2/1"
ASKED = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": False}


_TABLES = {"short_factor": [1.0, 1.2, 1.1, 1.3], "long_factor": [4.0, 2.0, 5.0, 3.0]}
_LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 8.0, **_TABLES}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16}),
    "phimoe longrope": (
        "phimoe",
        {"rope_parameters": {**_LONG, "short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "llama longrope": ("llama", {"rope_parameters": _LONG}),
    "llama dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16}),
    "llama yarn": ("llama", {"rope_parameters": _YARN}),
    "llama llama3": ("llama", {"rope_parameters": {**_YARN, **_BANDS, "rope_type": "llama3"}}),
    "gemma3_text dynamic and longrope": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {**_DYNAMIC, "rope_theta": 1e6},
                "sliding_attention": {**_LONG, "rope_theta": 1e4},
            },
            "max_position_embeddings": 16,
        },
    ),
}
"""Models whose rotary tables change at 16 tokens, and two with fixed tables: family and fields."""


@functools.cache
def whole_of(model_type: str) -> PreTrainedModel:
    """A random model of this family, or of one of `ROPES`, of four blocks."""
    family, fields = ROPES.get(model_type, (model_type, {}))
    # A copy, because a config changes the rotary parameters that it is given.
    return random_model(tiny_config(family, num_hidden_layers=4, **copy.deepcopy(fields)))


@functools.cache
def parts_of(model_type: str) -> SplitModel:
    """The parts of that model, to be copied."""
    return split_model(whole_of(model_type), SPLIT)


@dataclass
class Scene:
    """A trunk that is served, and the whole model."""

    model_type: str
    whole: PreTrainedModel
    run: RunSpec
    trunk: TrunkPart
    service: TrunkService

    def client(self, name: str = "alice", kv: str = "server", link: Link | None = None) -> "Client":
        """Another client of the trunk, on a local link by default."""
        model = copy.deepcopy(parts_of(self.model_type).client)
        wire = Tap(link or LocalLink(self.service, self.service.admit(name)))
        remote = RemoteTrunk(wire, model, self.run, client=name, kv=kv)
        connect(model, remote)
        return Client(model=model, remote=remote, wire=wire)

    def wanted(self, ids_BT: Tensor, **asked: Any) -> Tensor:
        """What the whole model generates."""
        return generated(self.whole, ids_BT, **asked)


@dataclass
class Client:
    """A client's model and its end of the trunk."""

    model: ClientPart
    remote: RemoteTrunk
    wire: "Tap"

    def sent(self, kind: type[R]) -> list[R]:
        """The requests of this kind that it has sent so far."""
        return [request for request in self.wire.sent if isinstance(request, kind)]

    def says(self, ids_BT: Tensor, **asked: Any) -> Tensor:
        """What the split model generates."""
        return generated(self.model, ids_BT, **asked)


def generated(model: PreTrainedModel, ids_BT: Tensor, **asked: Any) -> Tensor:
    """Prompts and eight more tokens, by default greedily; sampling begins at the same seed."""
    asked.setdefault("attention_mask", (ids_BT != 0).long())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tokens_BT: Tensor = model.generate(ids_BT, **{**ASKED, **asked})
    return tokens_BT


@contextmanager
def scene(
    model_type: str,
    clock: Callable[[], float] = time.monotonic,
    *,
    budget_s: float = 10.0,
    deadline_s: float = 30.0,
    limits: LimitsSpec | None = None,
    **budgets: Any,
) -> Iterator[Scene]:
    """Serve the trunk of a model of this family with these budgets of `GenerationSpec`."""
    run = RunSpec(
        split=SplitSpec.parse(SPLIT),
        generation=GenerationSpec(**budgets),
        wire=WireSpec(budget_s=budget_s),
        policy=PolicySpec(deadline_s=deadline_s),
        limits=limits or LimitsSpec(),
    )
    trunk = copy.deepcopy(parts_of(model_type).trunk)
    with TrunkService(trunk, run, clock) as service:
        whole = whole_of(model_type)
        yield Scene(model_type=model_type, whole=whole, run=run, trunk=trunk, service=service)


def prompt(tokens: int = 12, rows: int = 1, seed: int = 0, pad: int = 0) -> Tensor:
    """Random prompts; the first ends up with `pad` tokens of padding on its left."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, 99, (rows, tokens), generator=generator)
    ids_BT[0, :pad] = 0
    return ids_BT


class Tap(Link):
    """A link that notes what is sent; `before` and `after` an exchange something may happen.

    Each is called with the request and may raise: before, it was never sent; after, its reply is
    lost.
    """

    def __init__(self, link: Link) -> None:
        self.sent: list[Any] = []
        self.before: Callable[[Any], None] = _nothing
        self.after: Callable[[Any], None] = _nothing
        self._link = link

    def exchange(self, request: Any) -> Any:
        """Carry the request."""
        self.before(request)
        self.sent.append(request)
        reply = self._link.exchange(request)
        self.after(request)
        return reply

    def close(self) -> None:
        """Close the link inside."""
        self._link.close()


def _nothing(request: Any) -> None:
    """Stands for no fault."""
