"""Flower's client: for one message it builds its half, trains or evaluates, and lets all go.

What lasts from message to message (optimizer moments, how far the data was read, a personal
part) is in `context.state`, because a deployed ClientApp is a new process for every message.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.client.objective import ClientObjective
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer, FitStats
from fedsplit.client.unsplit import NoTrunk
from fedsplit.config import from_run_config, resolve
from fedsplit.console import quiet_libraries
from fedsplit.errors import ModelMismatch
from fedsplit.flower.client_arrays import packed, unpacked
from fedsplit.flower.node import (
    Node,
    Preparation,
    Share,
    remove_old_runs,
    share_of,
    texts_of,
    tokenizer_of,
)
from fedsplit.flower.records import (
    ARRAYS,
    METRICS,
    WEIGHT,
    Hello,
    JoinInfo,
    Memory,
    load_arrays,
    to_arrays,
)
from fedsplit.model import ClientPart, connect
from fedsplit.model.describe import client_of, config_of, personal, shared, whole_of
from fedsplit.model.placement import on_device
from fedsplit.runs.metrics import bits_per_byte
from fedsplit.spec import RunSpec
from fedsplit.transport.client import GrpcLink

Numbers = dict[str, int | float | list[int] | list[float]]
"""What Flower takes for the numbers of a reply."""

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this is and how it is configured, before any work is done."""
    run = from_run_config(context.run_config)
    node = Node.of(context, run)
    texts_of(run, node)  # better now than in the middle of a round
    if run.train.save_every:
        hello = Hello.of(message.content)
        where = node.checkpoints_of(run, hello.run_id)
        if hello.resumed:
            Memory.restore(where, hello.resumed, run)
        elif Memory.of(context.state) is None and not where.exists():
            remove_old_runs(where.parent, time.time())
            Memory().save(where, 0, run)
    told = ConfigRecord({"client": node.name, "config": run.fingerprint})
    return Message(RecordDict({"hello": told}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the halves together with the trunk for a round."""
    begin = time.monotonic()
    with _half(message, context) as half:
        run, memory = half.run, half.memory
        steps = run.train.steps_in_round(len(half.share), memory.steps)
        trainer = ClientTrainer(
            half.model,
            half.trunk,
            run,
            step=memory.steps,
            proximal_mu=_proximal_mu(message.content),
            shared=half.shared,
            loss_scale=memory.loss_scale,
            objective=_objective(run),
        )
        trainer.optimizer.load_state(memory.moments)
        stats = trainer.fit(half.share.groups(memory.batches, steps), round=half.join.round)
    memory = Memory(
        steps=trainer.steps,
        batches=memory.batches + steps * run.train.accumulation,
        moments=trainer.optimizer.state(),
        personal=half.personal,
        history=dict(half.trunk.encoder_state),
        loss_scale=trainer.loss_scale,
    )
    memory.put_into(context.state)
    if run.train.save_every:
        memory.save(half.node.checkpoints_of(run, half.join.run_id), half.join.round, run)
    content = RecordDict({METRICS: MetricRecord(half.numbers_of(stats, memory, begin))})
    if half.shared:
        content[ARRAYS] = packed(to_arrays(half.shared), run.wire.halves)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the loss on this client's held-out data."""
    with _half(message, context) as half:
        trainer = ClientTrainer(half.model, half.trunk, half.run, objective=_objective(half.run))
        stats = trainer.evaluate(half.share.evaluation(), round=half.join.round)
    numbers: Numbers = {
        WEIGHT: stats.num_tokens,
        "loss": stats.nats / max(1, stats.num_tokens),
        "bits-per-byte": bits_per_byte(stats.nats, stats.num_bytes),
        "nats": stats.nats,
        "bytes": stats.num_bytes,
        **stats.counts,
        **half.traffic,
    }
    return Message(RecordDict({METRICS: MetricRecord(numbers)}), reply_to=message)


@dataclass(slots=True, kw_only=True, eq=False)
class _Half:
    """A client for the time of one message: its model, its data, its way to the trunk.

    A baseline's client has the unsplit model, and no way to any trunk.
    """

    run: RunSpec
    join: JoinInfo
    node: Node
    memory: Memory
    share: Share
    model: PreTrainedModel
    trunk: RemoteTrunk | NoTrunk
    link: GrpcLink | None

    @property
    def shared(self) -> Mapping[str, nn.Parameter]:
        """What the server gets: the trained parameters that are not personal, by name."""
        return shared(self.model, self.run)

    @property
    def personal(self) -> dict[str, Tensor]:
        """What stays here."""
        return {name: p.detach() for name, p in personal(self.model, self.run).items()}

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that crossed the stream."""
        up, down = (self.link.bytes_up, self.link.bytes_down) if self.link else (0, 0)
        return {"bytes-up": up, "bytes-down": down}

    def numbers_of(self, stats: FitStats, memory: Memory, begin: float) -> Numbers:
        """What a reply says of a round of training that began at `begin`."""
        most = self.run.train.max_steps
        return {
            WEIGHT: stats.num_tokens,
            "loss": stats.loss,
            "steps": stats.steps,
            "repeated": stats.repeated,
            "refused": stats.refused,
            "skipped": stats.skipped,
            "seconds": time.monotonic() - begin,
            "peak-bytes": stats.peak_bytes,
            "done": int(0 < most <= memory.steps),
            **self.traffic,
        }


@contextmanager
def _half(message: Message, context: Context) -> Iterator[_Half]:
    quiet_libraries()
    run, join = from_run_config(context.run_config), JoinInfo.of(message.content)
    if join.config != run.fingerprint:
        raise ModelMismatch(
            f"the server runs configuration {join.config}, this client {run.fingerprint}; start "
            "both from the same code, conf/ and overrides"
        )
    node = Node.of(context, run)
    preparation = Preparation(tokenizer=join.tokenizer, labels=join.labels)
    share = share_of(run, node, preparation)
    memory = _memory(context, node, run, join)
    config = config_of(run, tokenizer_of(run, preparation), join.labels)
    build = client_of if run.baseline == "none" else whole_of
    model: PreTrainedModel = build(run, config, node.device)
    on_device(model, node.device)
    if ARRAYS in message.content:
        halves = shared(model, run)
        shapes = {name: tuple(parameter.shape) for name, parameter in halves.items()}
        came = message.content.array_records[ARRAYS]
        load_arrays(halves, unpacked(came, run.wire.halves, shapes))
    with torch.no_grad():
        for name, parameter in personal(model, run).items():
            if memory.personal:
                parameter.copy_(memory.personal[name])
    half = partial(_Half, run=run, join=join, node=node, memory=memory, share=share, model=model)
    if not isinstance(model, ClientPart):
        yield half(trunk=NoTrunk(model, client=join.client), link=None)
        return
    wire = replace(run.wire, tls_ca=node.tls_ca)
    with closing(GrpcLink(join.address, token=join.token, wire=wire)) as link:
        trunk = RemoteTrunk(
            link,
            model,
            run,
            client=join.client,
            encoder_state=memory.history,
        )
        connect(model, trunk)
        yield half(trunk=trunk, link=link)


def _memory(context: Context, node: Node, run: RunSpec, join: JoinInfo) -> Memory:
    kept = Memory.of(context.state)
    if kept is None and join.resumed:
        return Memory.restore(node.checkpoints_of(run, join.run_id), join.resumed, run)
    return kept or Memory()


def _objective(run: RunSpec) -> type[ClientObjective]:
    """Return what the run's strategy has clients minimize; a baseline runs none of `strategies`."""
    if run.baseline != "none":
        return ClientObjective
    objective: type[ClientObjective] = resolve(run.strategy.target).client_objective
    return objective


def _proximal_mu(content: RecordDict) -> float:
    """FedProx's weight, where the halves' strategy sends one."""
    config = content.config_records.get("config", ConfigRecord())
    return float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
