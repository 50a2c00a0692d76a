"""Flower's ClientApp: builds the client's part for one message, and trains or evaluates it.

State that lasts from message to message (optimizer moments, the position in the data, a personal
part) is in `context.state`, because a deployed ClientApp is a new process for every message.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.client.metered import MeteredLink
from fedsplit.client.objective import ClientObjective
from fedsplit.client.public_text import public_ids
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.seal import SealedWeights
from fedsplit.client.stats import FitStats
from fedsplit.client.trainer import ClientTrainer
from fedsplit.client.unsplit import NoTrunk
from fedsplit.config import from_run_config, resolve_class
from fedsplit.console import quiet_libraries
from fedsplit.errors import ModelMismatch
from fedsplit.flower.client_arrays import packed, unpacked
from fedsplit.flower.logs import show_logs
from fedsplit.flower.node import Node, remove_old_runs
from fedsplit.flower.prototype import Prototype
from fedsplit.flower.records import (
    ARRAYS,
    METRICS,
    TOLD_NOTHING,
    WEIGHT,
    Hello,
    JoinInfo,
    Memory,
    load_arrays,
    to_arrays,
)
from fedsplit.flower.sealed_arrays import most_tokens, record_of, sealed_of
from fedsplit.flower.share import Preparation, Share, share_of, tokenizer_of
from fedsplit.flower.shielding import ClientShield, shielded
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.withheld import withholding
from fedsplit.model import ClientPart, connect
from fedsplit.model.describe import client_of, config_of, personal, shared, whole_of
from fedsplit.model.limits import require_rows
from fedsplit.model.placement import on_device
from fedsplit.runs.metrics import bits_per_byte
from fedsplit.spec import RunSpec
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.sinks import Telemetry
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.failover import FailoverLink
from fedsplit.transport.tls import channel_credentials

Numbers = dict[str, int | float | list[int] | list[float]]
"""The numbers of a reply, in the types that Flower's `MetricRecord` accepts."""

_PATIENCE_S = 10.0
"""Seconds for which no process may listen at the trunk's address. A trunk that was started again
has other tokens, so no client waits for it."""

log = logging.getLogger(__name__)

app = ClientApp()

PROTOTYPE = Prototype()
"""The model of the clients of this process, from which each message copies its own."""


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Reply with the client's name and its configuration's fingerprint, before any work."""
    show_logs()
    run, hello = from_run_config(context.run_config), Hello.of(message.content)
    node = Node.of(context, run).known_as(run, hello.run_id)
    identity = ConfigRecord({"client": node.name, "config": run.fingerprint})
    reply = Message(RecordDict({"hello": identity}), reply_to=message)
    if hello.config != run.fingerprint:
        # The server reports that the configurations differ, and in which settings.
        reply.content["settings"] = ConfigRecord({**run.texts})
        return reply
    # An error in the data is reported before the first round, not in the middle of one.
    preparation = Preparation(tokenizer=hello.tokenizer, labels=hello.labels)
    with withholding(node):
        share, tokenizer = share_of(run, node, preparation), tokenizer_of(run, preparation)
    share.require_full_batches(node.name or "this client")
    with withholding(node):
        # A client loads the tokenizer of a pretrained model by itself.
        config = config_of(run, tokenizer, hello.labels)
        require_rows(config, tokenizer, hello.labels)
        if node.privacy.kind != "off":
            public_ids(node.privacy.public, run.data.sequence_length, tokenizer, config)
            node.secrets_of(run, hello.run_id)
        node.seal_of(run, hello.run_id)
        if run.baseline == "none":
            # The trunk is not called yet, but its authority's file can be read.
            channel_credentials(node.wire_of(run))
    if folder := node.checkpoints_of(run, hello.run_id):
        with withholding(node):
            if not folder.exists():
                remove_old_runs(folder.parent, time.time())
            identity["states"] = Memory.intact(folder, run)
    elif node.keeps_states(run):
        # The server has not assigned a name yet.
        identity["states"] = list[int]()
    return reply


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client weights together with the trunk for a round."""
    begin = time.monotonic()
    with _session(message, context) as session:
        run, memory = session.run, session.memory
        steps = run.train.steps_in_round(len(session.share), memory.steps)
        trainer = ClientTrainer(
            session.model,
            session.trunk,
            run,
            step=memory.steps,
            proximal_mu=_proximal_mu(message.content),
            shared=session.shared,
            loss_scale=memory.loss_scale,
            lr_scale=session.join.lr_scale,
            objective=_objective(run),
            shield=session.noise.shield if session.noise else None,
            telemetry=session.telemetry,
        )
        trainer.optimizer.load_state(memory.moments)
        stats = trainer.fit(session.share.groups(memory.batches, steps), round=session.join.round)
        told = session.told
    join = session.join
    memory = Memory(
        id=join.next_state,
        steps=trainer.steps,
        batches=memory.batches + steps * run.train.accumulation,
        moments=trainer.optimizer.state(),
        personal=session.personal,
        history=dict(session.trunk.encoder_state),
        loss_scale=trainer.loss_scale,
    )
    memory.put_into(context.state)
    if folder := session.node.checkpoints_of(run, join.run_id):
        with withholding(session.node):
            memory.save(folder, join, run)
    numbers = {**session.numbers_of(stats, memory, begin), **told}
    content = RecordDict({METRICS: MetricRecord(numbers)})
    # With client_weights.personal=both all client weights stay at the client.
    if session.shared:
        content[ARRAYS] = (
            record_of(session.sealed(stats.num_tokens))
            if run.client_weights.sealed
            else packed(to_arrays(session.shared), run.wire.client_weights)
        )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the loss on this client's held-out data."""
    with _session(message, context) as session:
        trainer = ClientTrainer(
            session.model,
            session.trunk,
            session.run,
            objective=_objective(session.run),
            shield=session.noise.shield if session.noise else None,
        )
        stats = trainer.evaluate(session.share.evaluation(), round=session.join.round)
        told = session.told
    numbers: Numbers = {
        WEIGHT: stats.num_tokens,
        "loss": stats.nats / max(1, stats.num_tokens),
        "bits-per-byte": bits_per_byte(stats.nats, stats.num_bytes),
        "nats": stats.nats,
        "bytes": stats.num_bytes,
        **stats.counts,
        **session.traffic,
        **told,
    }
    return Message(RecordDict({METRICS: MetricRecord(numbers)}), reply_to=message)


@dataclass(slots=True, kw_only=True, eq=False)
class _ClientSession:
    """A client while it works on one message: its model, its data and its link to the trunk.

    The client of a baseline has the unsplit model and no link.
    """

    run: RunSpec
    join: JoinInfo
    node: Node
    memory: Memory
    share: Share
    model: PreTrainedModel
    trunk: RemoteTrunk | NoTrunk
    link: FailoverLink | None
    telemetry: Telemetry
    noise: ClientShield | None = None

    @property
    def told(self) -> Mapping[str, float]:
        """The most that noisy rows have told the server of a text, over all rounds."""
        return self.noise.numbers if self.noise else TOLD_NOTHING

    @property
    def shared(self) -> Mapping[str, nn.Parameter]:
        """The client weights that go to the server: trained and not personal, by name."""
        return shared(self.model, self.run)

    def sealed(self, num_tokens: int) -> SealedWeights:
        """Return the client weights, sealed with the share of so many tokens of this round."""
        run, seal = self.run, self.node.seal_of(self.run, self.join.run_id)
        assert seal, "the run seals client weights"
        return seal.sealed(
            self.shared,
            num_tokens,
            most_tokens(run),
            client=self.node.partition,
            clients=run.clients,
        )

    @property
    def personal(self) -> dict[str, Tensor]:
        """The client weights that stay at the client, by name."""
        return {name: p.detach() for name, p in personal(self.model, self.run).items()}

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that were sent and received over the stream."""
        up, down = (self.link.bytes_up, self.link.bytes_down) if self.link else (0, 0)
        return {"bytes-up": up, "bytes-down": down}

    def numbers_of(self, stats: FitStats, memory: Memory, begin: float) -> Numbers:
        """Return the numbers of a reply; training began at `begin`, in monotonic seconds."""
        max_steps = self.run.train.max_steps
        return {
            WEIGHT: stats.num_tokens,
            "loss": stats.loss,
            "steps": stats.steps,
            "repeated": stats.repeated,
            "refused": stats.refused,
            # The others are no sign that training diverges.
            "skipped": stats.skipped - stats.overflows,
            "own-data": int(bool(self.node.data_path)),
            "seconds": time.monotonic() - begin,
            "peak-bytes": stats.peak_bytes,
            "done": int(0 < max_steps <= memory.steps),
            **self.traffic,
        }


@contextmanager
def _session(message: Message, context: Context) -> Iterator[_ClientSession]:
    """Build the client for a message, and close its link at the end of the block."""
    show_logs()
    quiet_libraries()
    run, join = from_run_config(context.run_config), JoinInfo.of(message.content)
    if join.config != run.fingerprint:
        raise ModelMismatch(
            f"the server runs configuration {join.config}, this client {run.fingerprint}; start "
            "both from the same code, conf/ and overrides"
        )
    node = Node.of(context, run, assigned=join.client)
    with (
        working_on(run=run.name, client=node.name),
        node.outlets_of(run).opened(node.name, needed=False) as telemetry,
        withholding(node),
        _built(context, node, run, join, message.content, telemetry) as session,
    ):
        yield session


@contextmanager
def _built(
    context: Context,
    node: Node,
    run: RunSpec,
    join: JoinInfo,
    content: RecordDict,
    telemetry: Telemetry,
) -> Iterator[_ClientSession]:
    preparation = Preparation(tokenizer=join.tokenizer, labels=join.labels)
    share = share_of(run, node, preparation)
    memory = _memory(context, node, run, join)
    config = config_of(run, tokenizer_of(run, preparation), join.labels)
    build = client_of if run.baseline == "none" else whole_of
    # The server knows the run's seed, and so the initial weights that it gives.
    seal = node.seal_of(run, join.run_id)
    begun = replace(run, seed=seal.initial) if seal else run
    model = PROTOTYPE.model_of(
        (join.run_id, begun, node.device), lambda: build(begun, config, node.device)
    )
    if run.baseline != "none":
        # Training needs no KV cache, which most families would create by default. The server's
        # model keeps its setting, because it is saved.
        model.config.use_cache = False
    on_device(model, node.device)
    if ARRAYS in content:
        weights = shared(model, run)
        shapes = {name: tuple(parameter.shape) for name, parameter in weights.items()}
        received = content.array_records[ARRAYS]
        if not seal:
            load_arrays(weights, unpacked(received, run.wire.client_weights, shapes))
        elif opened := seal.opened(sealed_of(received)):
            load_arrays(weights, to_arrays(opened))
    _restore_personal(model, run, memory)
    session = partial(
        _ClientSession,
        run=run,
        join=join,
        node=node,
        memory=memory,
        share=share,
        model=model,
        telemetry=telemetry,
    )
    if not isinstance(model, ClientPart):
        yield session(trunk=NoTrunk(model, client=join.client), link=None)
        return
    with closing(_link_to(node, run, join)) as link:
        trunk = RemoteTrunk(
            MeteredLink(link, telemetry) if telemetry else link,
            model,
            run,
            client=join.client,
            encoder_state=memory.history,
        )
        tokenizer = tokenizer_of(run, preparation)
        with shielded(node, run, join.run_id, model, tokenizer, trunk) as noise:
            connect(model, noise.shield if noise else trunk)
            yield session(trunk=trunk, link=link, noise=noise)


def _link_to(node: Node, run: RunSpec, join: JoinInfo) -> FailoverLink:
    given = (join.address, *join.other_addresses)
    # A node with an address of its own for the trunk has the same one for each.
    addresses = dict.fromkeys(map(node.address_of_trunk, given))
    options: dict[str, Any] = {"wire": node.wire_of(run), "patience_s": _PATIENCE_S}
    return FailoverLink([GrpcLink(each, token=join.token, **options) for each in addresses])


def _restore_personal(model: PreTrainedModel, run: RunSpec, memory: Memory) -> None:
    # A client's first message finds no personal part yet: it starts from the model's own.
    if memory.personal:
        with torch.no_grad():
            for name, parameter in personal(model, run).items():
                parameter.copy_(memory.personal[name])


def _memory(context: Context, node: Node, run: RunSpec, join: JoinInfo) -> Memory:
    """Return the state of the client that the server names: Flower's, or that of a checkpoint."""
    memory = Memory.of(context.state)
    if memory.id == join.state:
        return memory
    # The run went back, the server did not get the last reply, or Flower's state was lost with the
    # process of the SuperNode.
    if not join.state:
        return Memory()
    if folder := node.checkpoints_of(run, join.run_id):
        return Memory.restore(folder, join.state, run)
    log.warning(
        "%s continues from another state than the server's, because it has no checkpoints "
        "(train.save_every, and state-dir in --node-config)",
        node.name,
    )
    return memory


def _objective(run: RunSpec) -> type[ClientObjective]:
    """Return the objective of the run's strategy; a baseline uses the default objective."""
    if run.baseline != "none":
        return ClientObjective
    method: type[SplitStrategy] = resolve_class(run.strategy.target, SplitStrategy)
    return method.client_objective


def _proximal_mu(content: RecordDict) -> float:
    """Return FedProx's weight if the wrapped Flower strategy sent one, else 0."""
    config = content.config_records.get("config", ConfigRecord())
    return float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
