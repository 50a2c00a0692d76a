"""The frozen requests and replies between the servers of one run: its leader and its followers.

A follower computes for its own clients, and the leader steps. A follower sends them with the token
that the servers of the run share; the leader refuses them from anybody else.
"""

from dataclasses import dataclass

from torch import Tensor

from fedsplit.wire.messages import (
    CloseRequest,
    Reply,
    Request,
    StepReply,
    TrainingStateRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContributeRequest(Request[StepReply]):
    """A follower's request: contributes what a session has accumulated at the follower.

    `num_positions` are the sequences times tokens of the backwards, and `barrier_version` the
    number of barriers that had closed when this work began. `names` are those of the `gradients`.
    The other fields are those of the client's `StepRequest`.
    """

    session: str
    call: int
    step: int
    num_tokens: int
    client_sq_norm: float
    loss_scale: float
    num_positions: int
    barrier_version: int
    names: tuple[str, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParametersReply(Reply):
    """The trained parameters of a version, after `barrier_version` barriers have closed.

    `names` are those of the `parameters`; both are empty if the follower has this version already.
    """

    server_instance_id: str
    version: int
    barrier_version: int
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersRequest(Request[ParametersReply]):
    """A follower's request: reads the parameters as soon as there are others than it has.

    `follower` is its name, and `server_instance_id` (empty before the first reply) and `version`
    are those of its parameters. After `wait_s` seconds the reply comes without parameters.
    """

    follower: str
    server_instance_id: str
    version: int
    wait_s: float
    served_model_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkReportReply(Reply):
    """The work is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkReportRequest(Request[WorkReportReply]):
    """A follower's request: reports what happened there since its last report.

    `positions` are the sequences times tokens of the forwards of the session's client. `clipped`,
    `refused` and `quarantines` count those of all clients.
    """

    session: str
    positions: int
    clipped: int
    refused: int
    quarantines: int


OF_FOLLOWERS = (ContributeRequest, ParametersRequest, WorkReportRequest)
"""The requests that are for the servers of a run, and never for its clients."""

OF_LEADER = (ContributeRequest, WorkReportRequest, CloseRequest, TrainingStateRequest)
"""The requests that the leader answers in a session whose graphs are at a follower."""
