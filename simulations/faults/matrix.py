"""The crash matrix: which process is struck at which point, in each way of use."""

from collections.abc import Iterator

from simulations.faults.crash import Case
from simulations.faults.points import CLIENT_POINTS, STATE_POINTS, TRUNK_POINTS

_SIMULATED = {
    "simulation": (
        "forward received",
        "backward applied",
        "barrier half full",
        "step unpublished",
        "server checkpoint half written",
        "server checkpoint synced",
        "round start",
        "client weights half sent",
        "evaluation",
        "end of run",
        "result half written",
        "result written",
    ),
    "worker": (
        "forward replied",
        "client step taken",
        "client checkpoint synced",
        "client replies",
        "evaluation",
    ),
    "superlink": ("step taken", "evaluation", "end of run"),
    "superexec": ("step taken",),
    "gcs": ("step taken", "evaluation"),
    "raylet": ("step taken", "round start"),
    "launcher": ("step taken", "server checkpoint synced", "result half written"),
}
"""The points of `launch=flwr`, by victim."""

_DEPLOYED = {
    "serverapp": (
        "forward received",
        "barrier half full",
        "step unpublished",
        "server checkpoint synced",
        "round start",
        "client weights half sent",
        "evaluation",
        "result half written",
        "result written",
    ),
    "clientapp": ("forward replied", "client step taken", "client checkpoint synced"),
    "supernode": ("client step taken", "evaluation"),
    "superlink": ("step taken", "evaluation", "end of run"),
    "supervisor": ("step taken", "result half written"),
}
"""The points of a deployment, by victim."""

_SERVED = (
    "forward received",
    "forward replied",
    "backward received",
    "backward applied",
    "backward replied",
    "barrier half full",
    "step unpublished",
    "step taken",
)
"""The points of `fedsplit serve`, whose process is the victim."""


def cases(way: str) -> list[Case]:
    """Return all cases of a way of use."""
    return list(_CASES[way]())


def _inline() -> Iterator[Case]:
    for each in (*TRUNK_POINTS, *CLIENT_POINTS):
        yield Case(way="inline", point=each.name, victim="run")
    # Before the first checkpoint of the server there is nothing to resume.
    for point in ("client checkpoint synced", "step taken", "server checkpoint half written"):
        yield Case(way="inline", point=point, victim="run", after=0)
    # In the last round, and in the middle of a round.
    yield Case(way="inline", point="step taken", victim="run", after=2)
    yield Case(way="inline", point="barrier half full", victim="run", nth=3)
    yield Case(way="inline", point="step taken", victim="run", action="freeze")


def _flwr() -> Iterator[Case]:
    for victim, points in _SIMULATED.items():
        for point in points:
            yield Case(way="flwr", point=point, victim=victim)
    yield Case(way="flwr", point="step taken", victim="simulation", after=0)
    for victim in ("simulation", "worker", "superlink"):
        yield Case(way="flwr", point="step taken", victim=victim, action="freeze")


def _deployed() -> Iterator[Case]:
    for victim, points in _DEPLOYED.items():
        for point in points:
            yield Case(way="deployed", point=point, victim=victim)
    for victim in ("serverapp", "superlink"):
        yield Case(way="deployed", point="step taken", victim=victim, action="freeze")


def _served() -> Iterator[Case]:
    for point in _SERVED:
        yield Case(way="served", point=point, victim="server")
    for each in STATE_POINTS:
        yield Case(way="served", point=each.name, victim="server")
    yield Case(way="served", point="step taken", victim="server", after=0)
    yield Case(way="served", point="step taken", victim="server", action="freeze")


_CASES = {"inline": _inline, "flwr": _flwr, "deployed": _deployed, "served": _served}

QUICK = (
    Case(way="inline", point="step unpublished", victim="run"),
    Case(way="inline", point="server checkpoint synced", victim="run"),
    Case(way="inline", point="client checkpoint half written", victim="run"),
)
"""The cases of the suite, which kills the processes of `launch=flwr` elsewhere."""
