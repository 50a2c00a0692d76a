"""Plays a schedule: starts its clients and lets virtual time pass until all have ended."""

import functools
from collections import Counter
from dataclasses import dataclass, replace

from fedsplit.model.identity import model_fingerprint
from fedsplit.spec import (
    DataSpec,
    GenerationSpec,
    PolicySpec,
    RunSpec,
    SplitSpec,
    TrainSpec,
    WireSpec,
)
from fedsplit.wire import messages as m
from simulations.schedules.clients import TOKENS, Client
from simulations.schedules.events import Log
from simulations.schedules.schedule import Schedule
from simulations.schedules.server import RecordedService
from simulations.schedules.speaking import Speaker
from simulations.schedules.training import Trainer
from simulations.schedules.trunk import LR, WIDTH, PlainTrunk
from simulations.schedules.turns import Turns
from simulations.schedules.world import World

WAIT_S = 2.0
"""The deadline of a barrier, and the time after which a session without a connection ends."""

BUDGET_S = 60.0
"""The longest time of a call of a client with all its retries."""

CALL_S, STASH_S, IDLE_S = 5.0, 3.0, 20.0
PATIENT_S = 1e5
CACHE_BYTES = 1024
"""The bytes of one cache."""

_MOST_EVENTS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cast:
    """The classes that a schedule is played with; a planted bug replaces one of them."""

    service: type[RecordedService] = RecordedService
    trainer: type[Trainer] = Trainer
    speaker: type[Speaker] = Speaker


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Played:
    """A schedule that was played: its events, the faults that happened, and the run."""

    schedule: Schedule
    run: RunSpec
    log: Log
    happened: Counter[tuple[str, str]]


class Stage:
    """What schedules share, because it is costly to make: a trunk and threads."""

    def __init__(self) -> None:
        self._trunk, self._turns = PlainTrunk(), Turns()

    def play(self, schedule: Schedule, cast: Cast) -> Played:
        """Play a schedule to its end."""
        run = _run_of(schedule)
        world = World(schedule, run, kind=cast.service, trunk=self._trunk, turns=self._turns)
        opening = {
            "protocol": m.PROTOCOL,
            "model": model_fingerprint(self._trunk.config, run.split),
            "config": _fingerprint_of(run),
            "hidden_size": WIDTH,
        }
        trainers = [cast.trainer(name, world, run, opening) for name in schedule.trainers]
        speakers = [cast.speaker(name, world, run, opening) for name in schedule.speakers]
        _play(world, trainers, speakers)
        return Played(schedule=schedule, run=run, log=world.log, happened=world.happened)

    def close(self) -> None:
        """End the threads."""
        self._turns.close()


def _play(world: World, trainers: list[Trainer], speakers: list[Speaker]) -> None:
    """Play the schedule of a world with these clients."""
    clients: list[Client] = [*trainers, *speakers]

    def invite() -> None:
        here = [each for each in trainers if not each.is_gone]
        world.expect([each.name for each in here])
        # After its restart, the trunk is behind those who had finished, or are about to.
        for each in here:
            each.is_invited = True
            if each.is_done:
                each.start()

    world.on_restart = invite
    late = trainers[-1] if world.schedule.late else None
    world.expect([each.name for each in trainers if each is not late])
    for number, client in enumerate(clients):
        wait = world.schedule.late if client is late else number * 1e-3
        world.clock.after(wait, client.start)
    for _ in range(_MOST_EVENTS):
        world.settle()
        if not world.clock.next():
            break
    for client in clients:
        if not client.is_done:
            client.note("hangs")
    world.end()


def _run_of(schedule: Schedule) -> RunSpec:
    return _run(
        schedule.policy,
        len(schedule.steps),
        schedule.is_exact,
        schedule.deltas,
        schedule.tight,
        schedule.batches,
    )


@functools.cache
def _fingerprint_of(run: RunSpec) -> str:
    return run.fingerprint


@functools.cache
def _run(
    policy: str, clients: int, is_exact: bool, deltas: bool, tight: bool, batches: int
) -> RunSpec:
    wire = WireSpec(call_deadline_s=CALL_S, budget_s=BUDGET_S, stash_ttl_s=STASH_S)
    if deltas:
        wire = replace(wire, up="fp16", down="fp16", history_bytes=1 << 10)
    if tight:
        wire = replace(wire, stash_bytes=1)
    return RunSpec(
        seed=0,
        clients=clients,
        split=SplitSpec.parse("1/1/1"),
        data=DataSpec(sequence_length=TOKENS),
        policy=PolicySpec(
            kind=policy,
            quorum=2 if policy == "quorum" else 0.8,
            # A client that is missing changes the numbers, so a run that must be exact waits.
            deadline_s=PATIENT_S if is_exact else WAIT_S,
            # The discount of one version is a power of two, so that a step rounds once.
            discount_a=2.0,
            max_staleness=1,
        ),
        train=TrainSpec(
            batch_size=1,
            accumulation=batches,
            local_steps=100,
            optimizer="sgd",
            lr=LR,
            schedule="constant",
            warmup_steps=0,
            clip_norm=0.0,
        ),
        wire=wire,
        generation=GenerationSpec(
            session_tokens=64,
            cache_bytes=CACHE_BYTES if tight else 1 << 20,
            ttl_s=IDLE_S,
            max_queue_delay_s=0.0,
        ),
    )
