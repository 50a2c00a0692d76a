"""The points of a run at which the harness strikes: functions of the product, by name.

The product has no hook. A point is the call or the return of one of its functions, which
`hook/sitecustomize.py` wraps in every process of a run.
"""

from dataclasses import dataclass
from typing import Literal

_TRAINING, _SERVICE = "fedsplit.trunk.training", "fedsplit.trunk.service"
_COORDINATOR, _RECORDER = "fedsplit.flower.strategy.coordinator", "fedsplit.flower.run_recorder"
_CLIENT = "fedsplit.flower.client_app"
_SERVERS, _CLIENTS = r"/checkpoints", r"/client-\d+/[0-9a-f]{16}"
# A client's checkpoint has the id of its state in its name.
_TEMPORARY = r"/\.unfinished-round-\d+(-[0-9a-f]{16})?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The call ("before") or the return ("after") of a function in the namespace of a module.

    With an `argument`, a regular expression, only calls count whose first argument's text has it.
    """

    name: str
    module: str
    function: str
    when: Literal["before", "after"] = "before"
    argument: str = ""


def _point(
    name: str, module: str, function: str, when: Literal["before", "after"], argument: str = ""
) -> Point:
    return Point(name=name, module=module, function=function, when=when, argument=argument)


def _checkpoint(side: str, folder: str) -> tuple[Point, ...]:
    """Return the points at which one side writes a checkpoint into a folder of this pattern."""
    atomic = "fedsplit.atomic"
    return (
        # The label, the last file, is not there yet.
        _point(
            f"{side} checkpoint half written",
            "fedsplit.runs.checkpoint",
            "sha256_of",
            "before",
            folder + _TEMPORARY,
        ),
        _point(f"{side} checkpoint unsynced", atomic, "_sync", "before", f"{folder}{_TEMPORARY}/"),
        _point(f"{side} checkpoint synced", atomic, "_sync", "after", f"{folder}{_TEMPORARY}$"),
        _point(f"{side} checkpoint renamed", atomic, "_sync", "before", f"{folder}$"),
    )


TRUNK_POINTS = (
    _point("forward received", _TRAINING, "Training.prepare_forward", "before"),
    _point("forward replied", _SERVICE, "TrunkService._forward", "after"),
    _point("backward received", _TRAINING, "Training.prepare_backward", "before"),
    _point("backward applied", _TRAINING, "Training.backward", "after"),
    _point("backward replied", _SERVICE, "TrunkService._backward", "after"),
    # The first of two clients has contributed.
    _point("barrier half full", _TRAINING, "Training.contribute", "after"),
    _point("step unpublished", "fedsplit.trunk.versions", "ParameterVersions._publish", "before"),
    _point("step taken", "fedsplit.trunk.update", "TrunkStep.take", "after"),
    *_checkpoint("server", _SERVERS),
    _point("round start", _COORDINATOR, "RoundCoordinator.work", "before"),
    # One of two replies has been collected.
    _point("client weights half sent", _COORDINATOR, "training_content", "after"),
    _point("evaluation", _TRAINING, "Training.evaluate", "before"),
    _point("round recorded", _RECORDER, "RunRecorder.on_round", "before"),
    _point("end of run", _RECORDER, "RunRecorder._finish", "before"),
    _point("result half written", "fedsplit.atomic", "_sync", "before", r"/\.unfinished-model$"),
    _point("result written", _RECORDER, "write_result", "after"),
)
"""The points that the process with the trunk reaches."""

STATE_POINTS = _checkpoint("state", r"/state/base")
"""The points at which `fedsplit serve` saves a trunk."""

CLIENT_POINTS = (
    _point("client step taken", "fedsplit.client.trainer", "ClientTrainer._step", "after"),
    _point("client replies", _CLIENT, "packed", "before"),
    *_checkpoint("client", _CLIENTS),
)
"""The points that the process of a client reaches."""

POINTS = {point.name: point for point in (*TRUNK_POINTS, *STATE_POINTS, *CLIENT_POINTS)}

PROGRESS = ("step taken", "evaluation", "result written")
"""The points that show that a run goes on."""
