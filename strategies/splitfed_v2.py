"""SplitFed V2: one trunk that all clients train together, and halves that are averaged.

Thapa, Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
Learning", AAAI 36(8), arXiv 2004.12088, section 3.4 (SFLV2): the server side is one model; the
client sides are aggregated after each round. There the server takes the clients one after the
other in random order; here it takes them as the run's policy says. The halves are the business
of any Flower strategy, FedAvg by default; this one wraps it.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsplit.errors import (
    ConfigError,
    DeadlineExceeded,
    Diverged,
    FedsplitError,
    ModelMismatch,
)
from fedsplit.flower.hosting import TrunkHost
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, Ticket, num_bytes
from fedsplit.metrics import RoundStats, bits_per_byte
from fedsplit.spec import RunSpec

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Training:
    """What a round's training came to, until its evaluation completes the numbers."""

    loss: float
    tokens: int
    seconds: float
    bytes_up: int
    bytes_down: int
    halves_bytes: int
    clients: int
    late: int
    failed: int


class SplitFedV2(Strategy):
    """Hosts the trunk and wraps a Flower strategy for the halves.

    Args:
        halves: What averages bottoms and tops.
        host: The trunk; it is served from `start` to its end, whatever happens.
        run: The run.
        tokenizer: A tokenizer as JSON for clients to use; empty if the model brings its own.
        on_round: Is told of every round that is over.
    """

    def __init__(
        self,
        *,
        halves: Strategy,
        host: TrunkHost,
        run: RunSpec,
        tokenizer: str,
        on_round: Callable[[RoundStats], None],
    ) -> None:
        self._halves = halves
        self._host = host
        self._run = run
        self._tokenizer = tokenizer
        self._on_round = on_round
        self._clients: dict[int, str] = {}
        self._asked = 0
        self._sent_bytes = 0
        self._since = 0.0
        self._training: _Training | None = None

    def start(self, grid: Grid, *args: Any, **options: Any) -> Result:
        """Run all rounds, as `flwr.serverapp.strategy.Strategy.start`, with the trunk served.

        Raises:
            DeadlineExceeded: Too few clients connected in time.
            ModelMismatch: A client is configured for another run.
            Diverged: No client finished a round.
        """
        # Clients answer first: a process that a simulation forks while gRPC starts here would die.
        self._meet(grid, self._await_nodes(grid, self._run.clients))
        with self._host:
            log(INFO, "Trunk is served at %s", self._host.address)
            return super().start(grid, *args, **options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give every client that the wrapped strategy chose a ticket to the trunk."""
        self._await_nodes(grid, 1)
        chosen = self._halves.configure_train(server_round, arrays, config, grid)
        messages = self._with_tickets(server_round, list(chosen), grid)
        self._since = time.monotonic()
        at_once = self._run.launch.workers or len(messages)
        self._host.service.open_round(server_round, expected=min(at_once, len(messages)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have the wrapped strategy aggregate the halves, in the order of the clients' names."""
        heard = self._in_order(replies)
        good = self._finished(heard, f"round {server_round}, training")
        tokens = int(_sum(good, WEIGHT))
        self._training = _Training(
            loss=sum(_number(m, "loss") * _number(m, WEIGHT) for m in good) / max(1, tokens),
            tokens=tokens,
            seconds=time.monotonic() - self._since,
            bytes_up=int(_sum(good, "bytes-up")),
            bytes_down=int(_sum(good, "bytes-down")),
            halves_bytes=self._sent_bytes + sum(_halves_bytes(reply) for reply in heard),
            clients=len(good),
            late=sum(_number(m, "repeated") > 0 for m in good),
            failed=self._asked - len(good),
        )
        return self._halves.aggregate_train(server_round, heard)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Give every client that is to evaluate a ticket to the trunk."""
        self._await_nodes(grid, 1)
        chosen = self._halves.configure_evaluate(server_round, arrays, config, grid)
        return self._with_tickets(server_round, list(chosen), grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sum up the held-out losses, weighted by tokens, and report the round."""
        heard = self._in_order(replies)
        what = f"round {server_round}, evaluation"
        good = self._finished(heard, what) if self._asked else []
        if self._training is not None:
            self._on_round(self._stats(server_round, self._training, good))
        return self._halves.aggregate_evaluate(server_round, heard)

    def summary(self) -> None:
        """Say what is about to run."""
        log(INFO, "\tSplitFed V2: model %s, split %s", self._run.model, self._run.split)
        log(INFO, "\tHalves:")
        self._halves.summary()

    def _stats(
        self, server_round: int, training: _Training, evaluated: list[MetricRecord]
    ) -> RoundStats:
        nats, tokens = _sum(evaluated, "nats"), _sum(evaluated, WEIGHT)
        num_bytes = int(_sum(evaluated, "bytes"))
        return RoundStats(
            round=server_round,
            rounds=self._run.train.rounds,
            loss=training.loss,
            eval_loss=nats / tokens if tokens else math.nan,
            bits_per_byte=bits_per_byte(nats, num_bytes) if num_bytes else math.nan,
            tokens=training.tokens,
            seconds=training.seconds,
            bytes_up=training.bytes_up + int(_sum(evaluated, "bytes-up")),
            bytes_down=training.bytes_down + int(_sum(evaluated, "bytes-down")),
            halves_bytes=training.halves_bytes + self._sent_bytes,
            clients=training.clients,
            late=training.late,
            failed=training.failed,
            version=self._host.service.engine.version,
        )

    def _await_nodes(self, grid: Grid, wanted: int) -> list[int]:
        """The nodes that are connected, once there are as many as wanted."""
        clients, patience = self._run.clients, self._run.launch.start_timeout_s
        until = time.monotonic() + patience
        while len(nodes := list(grid.get_node_ids())) < wanted:
            if time.monotonic() > until:
                raise DeadlineExceeded(
                    f"{len(nodes)} of clients={clients} are connected after {patience:.0f} s; "
                    f"start {clients - len(nodes)} more, or lower clients. In a simulation: "
                    f"--federation-config 'num-supernodes={clients} init-args-num-cpus={clients} "
                    "client-resources-num-cpus=1'"
                )
            time.sleep(_POLL_S)
        return nodes

    def _meet(self, grid: Grid, nodes: list[int]) -> None:
        """Ask nodes for their names and configuration, before any work is done."""
        questions = [
            Message(RecordDict(), dst_node_id=node, message_type=f"{MessageType.QUERY}.hello")
            for node in nodes
        ]
        patience = self._run.launch.start_timeout_s
        for reply in grid.send_and_receive(questions, timeout=patience):
            if reply.has_error():
                raise ConfigError(f"a client cannot take part: {reply.error.reason}")
            told = reply.content.config_records["hello"]
            if told["config"] != self._run.fingerprint:
                raise ModelMismatch(
                    f"{told['client']!s} runs configuration {told['config']!s}, the server "
                    f"{self._run.fingerprint}; start both from the same code, conf/ and overrides"
                )
            self._clients[reply.metadata.src_node_id] = str(told["client"])
        if silent := [node for node in nodes if node not in self._clients]:
            raise DeadlineExceeded(
                f"{len(silent)} of {len(nodes)} nodes did not say within {patience:.0f} s who they "
                "are; look at their logs"
            )
        names = [name for node, name in self._clients.items() if node in nodes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"{len(nodes)} nodes are connected, but more than one says it is "
                f"{sorted(twice)[0]}; give each its own partition-id"
            )

    def _with_tickets(self, server_round: int, chosen: list[Message], grid: Grid) -> list[Message]:
        """The messages with a ticket each; who came late and cannot take part gets none."""
        for node in [message.metadata.dst_node_id for message in chosen]:
            if node not in self._clients:
                self._meet_late(grid, node)
        messages = [
            self._with_ticket(server_round, message)
            for message in chosen
            if message.metadata.dst_node_id in self._clients
        ]
        self._asked = len(chosen)
        self._sent_bytes = sum(_halves_bytes(message) for message in messages)
        return messages

    def _meet_late(self, grid: Grid, node: int) -> None:
        try:
            self._meet(grid, [node])
        except FedsplitError as error:
            log(WARNING, "Node %s is left out of this round: %s", node, error)

    def _with_ticket(self, server_round: int, message: Message) -> Message:
        client = self._clients[message.metadata.dst_node_id]
        ticket = Ticket(
            client=client,
            round=server_round,
            address=self._host.address,
            token=self._host.service.admit(client),
            config=self._run.fingerprint,
            tokenizer=self._tokenizer,
        )
        message.content = ticket.put_into(message.content)
        return message

    def _finished(self, replies: list[Message], what: str) -> list[MetricRecord]:
        """The metrics of the clients that finished; if none did, there is no going on."""
        reasons = []
        for reply in replies:
            if reply.has_error():
                reasons.append(reply.error.reason)
                log(WARNING, "%s: %s failed: %s", what, self._name_of(reply), reasons[-1])
        good = [reply.content.metric_records[METRICS] for reply in replies if reply.has_content()]
        if not good:
            raise Diverged(
                f"{what}: none of {self._asked} clients finished; the first said: "
                f"{reasons[0] if reasons else 'nothing before the timeout'}"
            )
        return good

    def _name_of(self, reply: Message) -> str:
        # For a node that is gone a SuperLink answers, in its own name.
        return self._clients.get(reply.metadata.src_node_id, "a node that is gone")

    def _in_order(self, replies: Iterable[Message]) -> list[Message]:
        # Sums of floats depend on the order; the order in which clients answer is chance.
        return sorted(replies, key=self._name_of)


def _number(metrics: MetricRecord, key: str) -> float:
    value = metrics[key]
    assert isinstance(value, int | float), "clients put single numbers there"
    return float(value)


def _sum(metrics: list[MetricRecord], key: str) -> float:
    return sum(_number(record, key) for record in metrics)


def _halves_bytes(message: Message) -> int:
    arrays = message.content.array_records.get(ARRAYS) if message.has_content() else None
    return num_bytes(arrays) if arrays else 0
