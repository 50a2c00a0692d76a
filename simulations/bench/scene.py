"""The setup that the measurements of generation share: models, a served trunk, and sizes.

Shapes: B sequences, T tokens.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.remote import RemoteTrunk
from fedsplit.model import ClientPart, TrunkPart, connect
from fedsplit.transport.client import GrpcLink
from simulations.bench.links import DelayedLink, WatchedLink
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.processes import Process, process
from simulations.bench.report import Report
from simulations.bench.roles import name_of, trunk_server


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The numbers of tokens in prompts, answers and circles, of sessions and turns; the latencies.

    The last latency is 100 ms. `pretrained` asks for SmolLM2 in place of random weights, where the
    text decides a figure. Drafts are fitted on `own_texts` of the model. Without a cache,
    `uncached_at` tokens of the long answer are measured. Each chat sends `beside_tokens` tokens
    from the begin of a prompt of `beside_prompt`.
    """

    shape: Shape
    prompt: int
    new_tokens: int
    long_prompt: int
    long_new: int
    uncached_at: int
    sessions: int
    turns: int
    circle: int
    latencies_s: tuple[float, ...]
    latency_turns: int
    beside_prompt: int
    beside_tokens: int
    pretrained: bool
    own_texts: int


SIZES = {
    "full": Size(
        shape=GPT2_SMALL,
        prompt=32,
        new_tokens=64,
        long_prompt=512,
        long_new=100,
        uncached_at=4,
        sessions=8,
        turns=5,
        circle=16,
        latencies_s=(0.0, 0.02, 0.1),
        latency_turns=3,
        beside_prompt=2000,
        beside_tokens=96,
        pretrained=True,
        own_texts=96,
    ),
    "toy": Size(
        shape=TOY,
        prompt=8,
        new_tokens=8,
        long_prompt=32,
        long_new=8,
        uncached_at=2,
        sessions=2,
        turns=1,
        circle=4,
        latencies_s=(0.1,),
        latency_turns=1,
        beside_prompt=400,
        beside_tokens=64,
        pretrained=False,
        own_texts=4,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The unsplit model, both of its parts, and the link between them."""

    size: Size
    report: Report
    whole: Any
    trunk: TrunkPart
    client: ClientPart
    link: WatchedLink
    server: Process
    address: str

    def far(self, seconds: float = 0.0, kv: str = "server") -> RemoteTrunk:
        """Connect the client to the trunk in the other process, with this latency."""
        link = DelayedLink(self.link, seconds) if seconds else self.link
        trunk = RemoteTrunk(link, self.client, self.size.shape.run, client=name_of(0), kv=kv)
        connect(self.client, trunk)
        return trunk

    def prompt(self, rows: int, tokens: int) -> Tensor:
        """Return random tokens [rows, tokens]; the same in every call."""
        chance = torch.Generator().manual_seed(self.size.shape.seed)
        return torch.randint(1, self.size.shape.vocabulary, (rows, tokens), generator=chance)


@contextmanager
def staged(size: Size, report: Report) -> Iterator[Scene]:
    """Yield a scene of this size; its trunk's process runs until the end of the block."""
    shape = size.shape
    with process(trunk_server, shape) as server:
        address, token = server.ask("address"), server.ask("token", name_of(0))
        with closing(WatchedLink(GrpcLink(address, token=token, wire=shape.run.wire))) as link:
            yield Scene(
                size=size,
                report=report,
                whole=shape.whole(),
                trunk=shape.trunk(),
                client=shape.client(),
                link=link,
                server=server,
                address=address,
            )
