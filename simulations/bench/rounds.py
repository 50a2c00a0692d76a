"""Rounds of clients and a trunk in this process, of whom one may be an attacker.

Each client has a thread and a local link. The client weights are averaged after each round, as the
server of a run does: replies are checked first, and weighted by the trunk's own count of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data import TASKS, Batch, Examples, evaluation_batches, labels_of, load_corpus
from fedsplit.data.batches import training_batches
from fedsplit.errors import FedsplitError
from fedsplit.flower.npy import values_of
from fedsplit.flower.records import ARRAYS, METRICS, TOLD_NOTHING, WEIGHT, load_arrays, to_arrays
from fedsplit.flower.reply import training_content
from fedsplit.flower.share import partitions_of
from fedsplit.link import LocalLink
from fedsplit.model import ClientPart, connect
from fedsplit.model.describe import client_of, config_of, parts_of, shared
from fedsplit.spec import RunSpec
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from fedsplit.wire.codec import through_codec

Tamper = Callable[[Any, RunSpec], Any]
"""Returns the request that is sent in place of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What an attacker does otherwise than an honest client.

    `tamper` changes its requests. With `flips` it trains on other labels, and `repeats` is the
    number of backwards of every third step, since each takes time. With a `weight` it takes no
    step, and replies with zeros in place of its weights.
    """

    tamper: Tamper = lambda request, run: request
    flips: bool = False
    repeats: int = 1
    weight: int = 0


class TamperingLink(LocalLink):
    """A link that changes the requests of its client, and whose client does not check replies."""

    def __init__(self, service: TrunkService, token: str, run: RunSpec, tamper: Tamper) -> None:
        super().__init__(service, token)
        self._run, self._tamper = run, tamper

    def exchange(self, request: m.Request[m.R]) -> m.R:
        """Send a request as it was changed; see `fedsplit.link.Link`."""
        changed: m.Request[m.R] = self._tamper(request, self._run)
        reply = through_codec(self._service.handle(through_codec(changed), self._token))
        if isinstance(reply, m.BackwardReply) and not math.isfinite(reply.trunk_sq_norm):
            # The step of an attacker follows all the same, which its trainer would not send.
            assert isinstance(request, m.BackwardRequest), "the reply is to a backward"
            zeros_BTD = torch.zeros_like(request.grad_trunk_out_BTD)
            return replace(reply, grad_smashed_BTD=zeros_BTD, trunk_sq_norm=0.0)
        return reply


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A client: its model, its trainer, its data, and the number of batches that it has read."""

    name: str
    model: ClientPart
    trainer: ClientTrainer
    training: Examples
    held_out: Examples
    attack: Attack
    num_read: int = 0

    def batches(self, run: RunSpec) -> Iterator[Sequence[Batch]]:
        """Yield the batches of each step of a round."""
        if self.attack.weight:
            return
        train = run.train
        found = training_batches(
            self.training,
            batch_size=train.batch_size,
            num_batches=train.local_steps,
            seed=run.seed,
            start=self.num_read,
        )
        self.num_read += train.local_steps
        for number, batch in enumerate(found):
            flipped = 9 - batch.labels if self.attack.flips else batch.labels
            yield [replace(batch, labels=flipped)] * (1 if number % 3 else self.attack.repeats)


@dataclass(slots=True, kw_only=True, eq=False)
class Rounds:
    """The honest clients of a run and their trunk, and the client weights after the last round."""

    run: RunSpec
    service: TrunkService
    members: list[Member]
    attackers: list[Member]
    arrays: ArrayRecord
    failures: list[FedsplitError] = field(default_factory=list)

    def take(self, number: int, members: Sequence[Member]) -> None:
        """Train a round of these clients, and average the weights of those whose reply is good."""
        names = [member.name for member in members]
        self.service.expect(names, round=number, at_once=len(names), close_after=len(names))
        with ThreadPoolExecutor(len(names)) as pool:
            replies = list(pool.map(lambda member: self._train(number, member), members))
        self.service.close()
        good = [reply for reply in replies if reply is not None]
        weights = [_weight(reply) for reply in good]
        mean: dict[str, torch.Tensor] = {}
        for reply, weight in zip(good, weights, strict=True):
            share = weight / sum(weights)
            for name, array in reply.array_records[ARRAYS].items():
                part = torch.from_numpy(values_of(array).copy()) * share
                mean[name] = mean[name] + part if name in mean else part
        self.arrays = to_arrays(mean)

    def loss(self) -> float:
        """Return the loss of the honest clients on their held-out data; infinity if it is none."""
        nats, num_tokens = 0.0, 0
        for member in self.members:
            load_arrays(shared(member.model, self.run), self.arrays)
            size = self.run.train.batch_size
            stats = member.trainer.evaluate(evaluation_batches(member.held_out, size))
            nats, num_tokens = nats + stats.nats, num_tokens + stats.num_tokens
        return nats / num_tokens if math.isfinite(nats) else math.inf

    def _train(self, number: int, member: Member) -> RecordDict | None:
        weights = shared(member.model, self.run)
        load_arrays(weights, self.arrays)
        self.service.engine.work.take(member.name)
        try:
            stats = member.trainer.fit(member.batches(self.run), round=number)
            trained = to_arrays(weights)
            if member.attack.weight:
                trained = to_arrays({name: torch.zeros_like(p) for name, p in weights.items()})
            work = self.service.engine.work.take(member.name)
            numbers: dict[str, int | float | list[int] | list[float]] = {
                # A larger number would only have the reply refused.
                WEIGHT: member.attack.weight or min(stats.num_tokens, work.tokens),
                "loss": stats.loss,
                "steps": stats.steps,
                "repeated": stats.repeated,
                "refused": stats.refused,
                "skipped": stats.skipped,
                "seconds": 0.0,
                "peak-bytes": stats.peak_bytes,
                "done": 0,
                "own-data": 0,
                "bytes-up": 0,
                "bytes-down": 0,
                **TOLD_NOTHING,
            }
            return training_content(
                RecordDict({METRICS: MetricRecord(numbers), ARRAYS: trained}),
                sent=self.arrays,
                codec="none",
                work=work,
                is_stepped=True,
                client=member.name,
            )
        except FedsplitError as failure:
            self.failures.append(failure)
            return None
        finally:
            self.service.release(member.name)


def _weight(reply: RecordDict) -> float:
    weight = reply.metric_records[METRICS][WEIGHT]
    assert isinstance(weight, int | float), "a checked reply has numbers"
    return weight


@contextmanager
def rounds_of(run: RunSpec, attack: Attack | None = None) -> Iterator[Rounds]:
    """Serve the trunk of a run to its clients; the last client is the attacker, if there is one."""
    corpus = load_corpus(run.data, run.task)
    labels = labels_of(corpus)
    config, task = config_of(run, None, labels), TASKS[run.task]
    trunk = parts_of(run, config).trunk
    training, held_out = partitions_of(run.data, run.task, run.sharding, run.clients, run.seed)
    with TrunkService(trunk, run) as service:
        members = []
        for number in range(run.clients):
            own = attack if attack and number == run.clients - 1 else Attack()
            name, model = f"client-{number}", client_of(run, config)
            token = service.admit(name)
            link = LocalLink(service, token)
            if own is attack:
                link = TamperingLink(service, token, run, own.tamper)
            handle = RemoteTrunk(link, model, run, client=name)
            connect(model, handle)
            members.append(
                Member(
                    name=name,
                    model=model,
                    trainer=ClientTrainer(model, handle, run),
                    training=task.examples(training[number], run.data, None, labels),
                    held_out=task.examples(held_out[number], run.data, None, labels),
                    attack=own,
                )
            )
        honest = run.clients - bool(attack)
        yield Rounds(
            run=run,
            service=service,
            members=members[:honest],
            attackers=members[honest:],
            arrays=to_arrays(shared(members[0].model, run)),
        )
