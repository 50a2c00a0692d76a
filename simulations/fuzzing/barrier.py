"""Cases for clients at one trunk: hostile threads send requests while an honest client trains.

All clients share the trunk's parameters and its barrier, and half of the trunks are behind a
router. How the threads take turns is left to chance, and no result may depend on it.
"""

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fedsplit.errors import DeadlineExceeded, FedsplitError, Internal
from fedsplit.link import LocalLink
from fedsplit.model import TrunkPart
from fedsplit.spec import GuardSpec, PolicySpec
from fedsplit.trunk.router import TrunkRouter
from fedsplit.trunk.service import TrunkService
from fedsplit.wire import messages as m
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.samples import Samples, mutated
from simulations.fuzzing.stage import ATTACKERS, HONEST, RUN, SHAPE, Honest, Stage

_TOKEN = "shared"
_STEPS = 2

_RUN = replace(
    RUN,
    # The barrier waits for hostile clients that do not contribute, and only once.
    policy=PolicySpec(deadline_s=0.02),
    guard=GuardSpec(quarantine_s=0.02),
)


def barrier_case(case: Case, stage: Stage) -> None:
    """An honest client trains some steps, and gets the same bits as without the others."""
    rng = case.rng
    parts = {client: case.part(client) for client in ATTACKERS[: rng.randint(2, 3)]}
    with (
        _served(through_router=rng.random() < 0.5) as link_of,
        ThreadPoolExecutor(len(parts)) as threads,
    ):
        honest = Honest(link_of(HONEST), _RUN, stage.model())
        attacks = [
            threads.submit(_attack, part, link_of(client), _samples(stage, client))
            for client, part in parts.items()
        ]
        try:
            trained = honest.train(_STEPS)
        except FedsplitError as error:
            raise Wrong(f"the honest client ended in {error.code}: {error}") from error
    for part, attack in zip(parts.values(), attacks, strict=True):
        case.take(part)
        attack.result()
    if trained != _trained_alone():
        raise Wrong("the honest client got other bits than without hostile ones")
    case.got("the honest client's bits")


def _samples(stage: Stage, client: str) -> Samples:
    return Samples.of(stage.part, _RUN, stage.service.limits, client)


def _attack(case: Case, link: LocalLink, samples: Samples) -> None:
    """Send requests of which none contributes to a step."""
    rng, session = case.rng, "unknown"
    for call in range(rng.randint(2, 6)):
        for request in _requests(rng, samples, session, call):
            case.sent(request)
            try:
                answer = link.exchange(request)
            except (Internal, DeadlineExceeded) as error:
                raise Wrong(f"{error.code}: {error}") from error
            except FedsplitError as error:
                case.got(error)
                continue
            case.got(answer)
            if isinstance(answer, m.OpenReply):
                session = answer.session


def _requests(
    rng: random.Random, samples: Samples, session: str, call: int
) -> list[m.Request[Any]]:
    """A session, a step without an effect, or any request."""
    if call == 0 or rng.random() < 0.1:
        opened = samples.open(rng)
        training = replace(opened, config=samples.config, training=True, generating=False)
        return [rng.choice((opened, training))]
    if rng.random() < 0.4:
        forward = samples.forward(rng, session, call)
        backward = samples.backward(rng, session, call)
        # Another gradient than NaN, or NaN after a codec, could be part of the trunk's next step.
        nan_BTD = torch.full_like(forward.smashed_BTD, math.nan)
        backward = replace(backward, grad_trunk_out_BTD=nan_BTD, codec="none")
        return [forward, backward, samples.step(rng, session, call)]
    request = samples.request(rng, session, call)
    return [] if isinstance(request, m.BackwardRequest) else [mutated(request, rng)]


@contextmanager
def _served(*, through_router: bool) -> Iterator[Callable[[str], LocalLink]]:
    """Serve a new trunk; yield a function that returns the link of a client, by its name."""
    service = TrunkService(copy.deepcopy(_trunk()), _RUN)
    if through_router:
        with TrunkRouter({"trunk": service}, token=_TOKEN) as router:
            yield lambda _: LocalLink(router, _TOKEN)
    else:
        with service:
            yield lambda client: LocalLink(service, service.admit(client))


@functools.cache
def _trunk() -> TrunkPart:
    return SHAPE.trunk()


@functools.cache
def _trained_alone() -> list[bytes]:
    with _served(through_router=False) as link_of:
        return Honest(link_of(HONEST), _RUN, SHAPE.client()).train(_STEPS)
