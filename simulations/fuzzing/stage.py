"""What the fuzzer attacks: a trunk's service and server, and the honest client beside the attacker.

The same honest client also uses a second service, which nobody attacks. Each client trains a
replica of the trunk, so that a legal step of the attacker changes nothing for others.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data.batches import Batch
from fedsplit.errors import DeadlineExceeded, FedsplitError, Internal, NonFinite
from fedsplit.link import Link, LocalLink
from fedsplit.model import connect
from fedsplit.spec import GenerationSpec, GuardSpec, LimitsSpec, RunSpec, WireSpec
from fedsplit.transport.server import GrpcServer, largest_payload
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.wire import messages as m
from fedsplit.wire.codec import through_codec
from fedsplit.wire.replies import check_reply
from simulations.bench.models import Shape
from simulations.fuzzing.caller import DEADLINE_S, Caller
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.samples import Samples, bytes_of

SHAPE = Shape(blocks=3, hidden=16, heads=2, vocabulary=64, split="1/1/1", rows=4, tokens=16)
RUN = replace(
    SHAPE.run,
    train=replace(SHAPE.run.train, local_steps=10_000),
    wire=WireSpec(call_deadline_s=DEADLINE_S, budget_s=0.01, stash_bytes=4 << 20),
    generation=GenerationSpec(
        session_tokens=512, cache_bytes=1 << 20, max_queue_delay_s=0.0, stateless_bytes=1 << 20
    ),
    limits=LimitsSpec(sessions=24, sessions_per_client=6, body_s=2.0),
    guard=GuardSpec(quarantine_s=0.0),
)
ATTACKERS = ("mallory-0", "mallory-1", "mallory-2")
HONEST = "honest"
_USES = 16
"""How often sessions are used until one of them is replaced."""

_NAMES = 2_000
"""The most requests that are remembered by name."""

Answer = m.Reply | FedsplitError


class OwnReplicas(TrunkUpdate):
    """Every client trains its own copy of the trunk."""

    replicas = True


class Stage:
    """An attacked service with its server, and all that cases need of it."""

    def __init__(self, service: TrunkService, server: GrpcServer, run: RunSpec) -> None:
        self.service, self.run = service, run
        self.address = server.start()
        self.caller = Caller(self.address)
        self.part = SHAPE.client()
        self.max_bytes = largest_payload(service.limits)
        self.tokens = {name: service.admit(name) for name in ATTACKERS}
        self._links = {name: LocalLink(service, token) for name, token in self.tokens.items()}
        self.samples = {
            name: Samples.of(self.part, run, service.limits, name) for name in ATTACKERS
        }
        self._sessions: dict[tuple[str, int], str] = {}
        self._uses = 0
        self._named: dict[tuple[type, str, int], None] = {}

    @property
    def crashed(self) -> bool:
        """Whether the trunk's engine has ended."""
        return self.service.engine.ended.done()

    def link(self, client: str) -> Link:
        """Return an attacker's link in this process."""
        return self._links[client]

    def model(self) -> Any:
        """Return a client's part, which the caller may train."""
        return copy.deepcopy(self.part)

    def session(self, client: str, purpose: int) -> str:
        """Return an open session of an attacker: to train (0), to generate (1) or to evaluate."""
        name = self._sessions.get((client, purpose), "")
        self._uses += 1
        # Now and then a new one: an odd call may have left no legal next call.
        if not self.service.has(name) or self._uses % _USES == 0:
            samples = self.samples[client]
            opened = m.OpenRequest(
                protocol=m.PROTOCOL,
                client=client,
                model=samples.model,
                config=samples.config,
                hidden_size=samples.limits.hidden_size,
                round=0,
                training=purpose == 0,
                generating=purpose == 1,
            )
            name = self._links[client].exchange(opened).session
            self._sessions[client, purpose] = name
        return name

    def ask(self, case: Case, client: str, request: m.Request[Any]) -> Answer:
        """Send a request of an attacker; return its reply or coded error.

        Raises:
            Wrong: The service failed, did not answer in time, or answered with a wrong reply.
        """
        case.sent(request)
        answer: Answer
        try:
            handled = self.service.handle(through_codec(request), self.tokens[client])
            answer = through_codec(handled)
        except FedsplitError as error:
            answer = error
        # By contract, another request of the same name gets the reply of the first one.
        is_first = self._is_first(request)
        if isinstance(answer, m.Reply):
            answer = _taken(request, answer, is_first)
        case.got(answer)
        if isinstance(answer, Internal | DeadlineExceeded):
            raise Wrong(f"{answer.code}: {answer}") from answer
        return answer

    def _is_first(self, request: m.Request[Any]) -> bool:
        name = type(request), getattr(request, "session", ""), getattr(request, "call", -1)
        is_known = name in self._named
        self._named[name] = None
        if len(self._named) > _NAMES:
            del self._named[next(iter(self._named))]
        return not is_known


def _taken(request: m.Request[Any], reply: m.Reply, is_first: bool) -> Answer:
    """Return a reply as its client takes it.

    Raises:
        Wrong: It does not belong to the request.
    """
    wanted = type(request).__name__.replace("Request", "Reply")
    if type(reply).__name__ != wanted:
        raise Wrong(f"a {type(reply).__name__} came for a {type(request).__name__}")
    try:
        check_reply(request, reply)
    except NonFinite as error:  # of huge numbers, which the client sent
        return error
    except FedsplitError as error:
        if is_first:
            raise Wrong(f"the client would refuse the reply: {error}") from error
        return error
    return reply


class Honest:
    """An honest client.

    Args:
        link: Its link to the trunk.
        run: The run of both.
        model: Its part, which it trains.
    """

    def __init__(self, link: Link, run: RunSpec, model: Any) -> None:
        self._model = model
        self._batch = SHAPE.batch()
        trunk = RemoteTrunk(link, model, run, client=HONEST)
        connect(model, trunk)
        self._trainer = ClientTrainer(model, trunk, run)

    def train(self, steps: int) -> list[bytes]:
        """Train some steps; return the bits of the loss and of all weights."""
        loss = self._trainer.fit([[self._batch]] * steps).loss
        weights = self._model.state_dict().values()
        return [bytes_of(each) for each in (torch.tensor(loss, dtype=torch.float64), *weights)]

    def turn(self) -> list[bytes]:
        """Train a step, evaluate and generate; return the bits of the results and all weights."""
        prompt_BT = self._batch.inputs["input_ids"][:2, :4]
        trained = self.train(1)
        held_out: list[Batch] = [self._batch]
        evaluated = self._trainer.evaluate(held_out)
        text_BT = self._model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=3, do_sample=False
        )
        nats = torch.tensor(evaluated.nats, dtype=torch.float64)
        return [*trained, bytes_of(nats), bytes_of(text_BT)]


@contextmanager
def staged() -> Iterator[tuple[Stage, Honest, Honest]]:
    """A stage, its honest client, and the same client at a service that nobody attacks."""
    with ExitStack() as stack:
        services = [
            stack.enter_context(TrunkService(SHAPE.trunk(), RUN, update=OwnReplicas))
            for _ in range(2)
        ]
        attacked = services[0]
        server = GrpcServer(
            attacked, wire=RUN.wire, limits=attacked.limits, max_clients=8, budgets=RUN.limits
        )
        stage = Stage(attacked, server, RUN)
        stack.callback(server.stop, 0.0)
        stack.callback(stage.caller.close)
        links = [LocalLink(service, service.admit(HONEST)) for service in services]
        honest, alone = (Honest(link, RUN, SHAPE.client()) for link in links)
        yield stage, honest, alone
