"""The settings of a trunk server's budgets: how much one client, and all together, may take up."""

from dataclasses import dataclass
from typing import Annotated

from fedsplit.spec.checks import DURATION, Positive, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSpec:
    """Budgets of a trunk server per client and in total; they change no number of a run.

    A client over a budget loses its own least recently used state first, or is asked to wait.

    Attributes:
        clients (clients): The most clients that a trunk server without rounds remembers.
        sessions (sessions): The most open sessions of a trunk. Over this limit, the client with
            the most sessions loses its least recently used one that generates.
        sessions_per_client (sessions): The most open sessions of a client. Over this limit, its
            least recently used one that generates is dropped; the client replays it.
        reply_bytes (bytes): The largest reply of generation that is kept in case it has to be sent
            again. If a larger one is lost, the client replays its session.
        streams_per_client (streams): The most open streams of a client. Over this limit, its
            stream that is silent for the longest time is ended.
        calls_per_client (calls): The most calls of a client beside its streams.
        idle_s (seconds): The time after which a stream that carries no request is ended.
        metadata_bytes (bytes): The most metadata of a call, which has the client's token.
        body_s (seconds): The longest time that a server waits for a request that has begun, or for
            its next 4 MiB.
    """

    clients: Annotated[int, Positive()] = 1024
    sessions: Annotated[int, Positive()] = 1024
    sessions_per_client: Annotated[int, Positive()] = 64
    reply_bytes: Annotated[int, Positive()] = 4 << 20
    streams_per_client: Annotated[int, Positive()] = 8
    calls_per_client: Annotated[int, Positive()] = 8
    idle_s: Annotated[float, DURATION] = 600.0
    metadata_bytes: Annotated[int, Positive()] = 16 << 10
    body_s: Annotated[float, DURATION] = 10.0

    def __post_init__(self) -> None:
        check_fields(self, "limits")
