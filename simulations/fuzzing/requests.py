"""Cases for the trunk's service: requests with odd values, and legal requests in any order."""

from typing import Any

from fedsplit.wire import messages as m
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.samples import Samples, equal, mutated
from simulations.fuzzing.stage import ATTACKERS, Stage

_TWICE = 0.15
"""How often a request is sent again; the second reply must be the first one."""


def values_case(case: Case, stage: Stage) -> None:
    """A request with odd values, in a session in which the legal one is often allowed."""
    rng = case.rng
    client = rng.choice(ATTACKERS)
    samples, purpose = stage.samples[client], rng.randrange(3)
    session = stage.session(client, purpose)
    call = _next_call(case)
    match purpose:
        case 0 if rng.random() < 0.6:
            _train_oddly(case, stage, client, session, call)
            return
        case 1 if rng.random() < 0.7:
            request: m.Request[Any] = samples.generate(rng, session, call)
        case 2 if rng.random() < 0.7:
            request = samples.forward(rng, session, call)
        case _:
            request = samples.request(rng, session, call)
    stage.ask(case, client, mutated(request, rng))


def _train_oddly(case: Case, stage: Stage, client: str, session: str, call: int) -> None:
    """Forward, backward and step, of which one has odd values."""
    rng, samples = case.rng, stage.samples[client]
    odd_one = rng.randrange(3)
    for number, make in enumerate((samples.forward, samples.backward, samples.step)):
        request: Any = make(rng, session, call)
        if number == 0:
            trained: m.ForwardRequest = request
        elif number == 1 and rng.random() < 0.8:
            request = _backward_of(trained, request)
        stage.ask(case, client, mutated(request, rng) if number == odd_one else request)


def _backward_of(forward: m.ForwardRequest, backward: m.BackwardRequest) -> m.BackwardRequest:
    return m.BackwardRequest(
        session=backward.session,
        call=backward.call,
        want_grad=backward.want_grad,
        grad_trunk_out_BTD=forward.smashed_BTD.float().clamp(-1, 1) / 100,
        codec=backward.codec,
    )


def order_case(case: Case, stage: Stage) -> None:
    """Requests of several clients and sessions in any order, of which some are sent again."""
    rng = case.rng
    owners: dict[str, str] = {}
    call, forwards = _next_call(case), list[m.ForwardRequest]()
    for _ in range(rng.randint(3, 10)):
        client = rng.choice(ATTACKERS[:2])
        if not owners or rng.random() < 0.15:
            opened = stage.ask(case, client, stage.samples[client].open(rng))
            if isinstance(opened, m.OpenReply):
                owners[opened.session] = client
            continue
        session = rng.choice([*owners, *owners, "unknown"]) if rng.random() < 0.2 else [*owners][-1]
        if rng.random() < 0.9:
            client = owners.get(session, client)
        call = max(0, call + rng.choice((-1, 0, 0, 1, 1, 2)))
        request = _ordered(case, stage.samples[client], session, call, forwards)
        answer = stage.ask(case, client, request)
        if rng.random() < _TWICE and isinstance(answer, m.Reply):
            again = stage.ask(case, client, request)
            if isinstance(again, m.Reply) and not _may_differ(request, answer, again):
                raise Wrong("a request that was sent twice got another reply the second time")


def _ordered(
    case: Case, samples: Samples, session: str, call: int, forwards: list[m.ForwardRequest]
) -> m.Request[Any]:
    rng = case.rng
    match rng.randrange(8):
        case 0 | 1:
            forwards.append(samples.forward(rng, session, call))
            return forwards[-1]
        case 2 | 3 if forwards:
            return _backward_of(forwards[-1], samples.backward(rng, session, forwards[-1].call))
        case 4:
            return samples.step(rng, session, call)
        case 5 | 6:
            return samples.generate(rng, session, call)
        case 7:
            return samples.small(rng, session)
    return samples.backward(rng, session, call)


def _may_differ(request: m.Request[Any], first: m.Reply, second: m.Reply) -> bool:
    # What these tell may have changed meanwhile.
    told = m.ServiceInfoRequest | m.GradientsRequest | m.TrainingStateRequest | m.OpenRequest
    return isinstance(request, told) or equal(first, second)


def _next_call(case: Case) -> int:
    """Return a call that is new in a session that earlier cases used."""
    return case.number * 4 if case.rng.random() < 0.9 else case.rng.randrange(4)
