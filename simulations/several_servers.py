"""Trains the clients of one trunk at one server and at several, side by side; for `parity`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from torch import Tensor

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import Batch
from fedsplit.link import Link
from fedsplit.model import SplitModel, connect
from fedsplit.model.lora import trainable
from fedsplit.spec import RunSpec
from fedsplit.trunk.follower import FollowerService
from fedsplit.trunk.service import TrunkService

_SECRET = "of-the-servers"


class LinkTo(Protocol):
    """Makes a link to a service, which is closed at the end of the context."""

    def __call__(self, service: TrunkService, token: str) -> AbstractContextManager[Link]:
        """Return the context of the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The losses of each client's steps, and all weights after them, by client and name."""

    losses: dict[str, list[float]]
    weights: dict[str, Tensor]


def train(
    run: RunSpec, parts: Sequence[SplitModel], groups: Sequence[list[list[Batch]]], link: LinkTo
) -> Trained:
    """Train one trunk with several clients, at `launch.trunk_servers` servers.

    Args:
        run: The run.
        parts: A model for each client and each server, all with the same weights. The trunk of the
            first one is the leader's.
        groups: The batches of each client's steps.
        link: Connects the clients to their servers, and followers to the leader.
    """
    names = run.client_names
    with _servers(run, parts, link) as servers:
        leader = servers[0]
        leader.expect(names, round=1, at_once=len(names), close_after=len(names))

        def work(
            name: str, model: SplitModel, server: TrunkService, own: list[list[Batch]]
        ) -> list[float]:
            with link(server, leader.admit(name)) as reached:
                trunk = RemoteTrunk(reached, model.client, run, client=name)
                connect(model.client, trunk)
                trainer = ClientTrainer(model.client, trunk, run)
                with trunk.session():
                    return [trainer.step(group).loss for group in own]

        with ThreadPoolExecutor(len(names)) as pool:
            losses = list(pool.map(work, names, parts, cycle(servers), groups))
        # The last step is taken after the reply to the client that completed it.
        leader.engine.run(lambda: None).result()
    owners = {name: each.client for name, each in zip(names, parts, strict=False)}
    return Trained(
        losses=dict(zip(names, losses, strict=True)),
        weights={
            f"{owner}/{name}": parameter.detach()
            for owner, part in {**owners, "trunk": parts[0].trunk}.items()
            for name, parameter in trainable(part).items()
        },
    )


@contextmanager
def _servers(
    run: RunSpec, parts: Sequence[SplitModel], link: LinkTo
) -> Iterator[list[TrunkService]]:
    with ExitStack() as opened:
        leader = opened.enter_context(TrunkService(parts[0].trunk, run, servers_token=_SECRET))
        servers = [leader]
        for number in range(1, run.launch.trunk_servers):
            follower = FollowerService(
                parts[number].trunk,
                run,
                lambda: opened.enter_context(link(leader, _SECRET)),
                _SECRET,
                name=f"server-{number}",
            )
            servers.append(opened.enter_context(follower))
        opened.callback(leader.followers.close)
        yield servers
