"""Routes requests to one of several trunks, each a service of its own, which Open selects."""

import hmac
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from threading import Lock
from typing import Any

from fedsplit.errors import ConfigError, ModelMismatch, Overloaded, SessionLost, Unauthenticated
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.sessions import AcceptedStep, no_session
from fedsplit.wire import messages as m
from fedsplit.wire.server_messages import ParametersRequest


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A client of the trunk `name`: its token there, and its sessions, of which some may open."""

    name: str
    client: str
    service: TrunkService
    token: str
    heard_at: float
    opening: int = 0
    sessions: set[str] = field(default_factory=set)


class TrunkRouter:
    """Serves trunks by name to all clients with one token; implements `fedsplit.link.Service`.

    Each trunk has its own engine, optimizer and trained parameters. A client names itself when it
    opens a session. A client with the token is trusted not to take the name of another client.
    After that, the session's name, which is a secret, identifies the client.

    A trunk of another server can follow one of these (`fedsplit.trunk.leader`), if the services
    were made with a token for such servers.

    Args:
        services: The trunks by name; a client that names no trunk gets the first.
        token: The token that every client must present; empty to accept all clients.
        clock: Seconds that do not run backwards.
        forget_after_s: Seconds of silence after which a client without a session is forgotten.
        max_clients: The most clients to remember. To remember another one, the client without a
            session that is silent for the longest time is forgotten.

    Raises:
        ConfigError: There is no trunk.
    """

    def __init__(
        self,
        services: Mapping[str, TrunkService],
        *,
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
        forget_after_s: float = 600.0,
        max_clients: int = 1024,
    ) -> None:
        if not services:
            raise ConfigError("there is no trunk to serve; name at least one")
        self._services = dict(services)
        self._token = token
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._max_clients = max_clients
        # The client that is silent for the longest time first.
        self._clients: dict[tuple[str, str], _Member] = {}
        self._sessions: dict[str, _Member] = {}
        self._lock = Lock()
        self._open_services = ExitStack()

    def __enter__(self) -> "TrunkRouter":
        # If one service fails to start, the stack stops those that have started.
        with ExitStack() as opening:
            for service in self._services.values():
                opening.enter_context(service)
            self._open_services = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open_services.close()

    @property
    def limits(self) -> m.Limits:
        """The largest limit of all trunks; each trunk checks its own limits again."""
        each = [service.limits for service in self._services.values()]
        names = [limit.name for limit in fields(m.Limits)]
        return m.Limits(**{name: max(getattr(one, name) for one in each) for name in names})

    @property
    def num_clients(self) -> int:
        """The number of remembered clients; a client of two trunks counts twice."""
        return len(self._clients)

    # --- fedsplit.link.Service ----------------------------------------------------------------

    @property
    def trunks(self) -> "Mapping[str, Future[None]]":
        """Every trunk by name; see `fedsplit.link.Service`."""
        return {name: service.engine.ended for name, service in self._services.items()}

    def check_token(self, token: str) -> str:
        """Refuse clients without the token; see `fedsplit.link.Service`."""
        if self.is_server(token):
            return ""
        # The time of a plain comparison tells how long the correct prefix of a guess is.
        if self._token and not hmac.compare_digest(token.encode(), self._token.encode()):
            raise Unauthenticated(
                "the token is missing or not the one of this trunk server; present the one that "
                "it was started with"
            )
        return ""  # all clients share the token

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        if isinstance(request, m.ServiceInfoRequest):
            # Before the token is checked: any client may ask which trunks are served.
            return self._info(request, token)  # type: ignore[return-value]
        # To its service, a follower names itself, and a client its member.
        server = token if self.is_server(token) else ""
        if isinstance(request, ParametersRequest):
            if not server:
                raise Unauthenticated(
                    "this server's trunks have no followers with this token; start leader and "
                    "follower with one token of the servers"
                )
            service = self._services[self._name(request.served_model_name)]
            return service.handle(request, token)  # type: ignore[return-value]
        self.check_token(token)
        if isinstance(request, m.OpenRequest):
            return self._open(request, server)  # type: ignore[return-value]
        session: str = getattr(request, "session", "")
        member = self._member_of(session)
        try:
            reply = member.service.handle(request, server or member.token)
        except SessionLost:
            self._end(session)
            raise
        if isinstance(request, m.CloseRequest):
            self._end(session)
        return reply

    def is_server(self, token: str) -> bool:
        """Return whether a caller with this token is another server of one of the trunks."""
        return any(service.followers.is_one(token) for service in self._services.values())

    def payload_of(self, token: str) -> int:
        """Return the bytes of the longest request with this token; 0 for clients."""
        return max(service.followers.payload_of(token) for service in self._services.values())

    def close_followers(self) -> None:
        """Answer the followers that wait for parameters, and refuse further requests for them."""
        for service in self._services.values():
            service.followers.close()

    def disconnected(self, session: str) -> None:
        """Report a lost connection to the session's trunk; see `fedsplit.link.Service`."""
        with self._lock:
            member = self._sessions.get(session)
        if member:
            member.service.disconnected(session)

    def resume(self, name: str, steps: Mapping[str, AcceptedStep]) -> None:
        """Route these steps to the trunk `name`, which answers them if they are sent again."""
        for client, step in steps.items():
            member = self._admitted(name, client)
            with self._lock:
                member.opening -= 1
                member.sessions.add(step.session)
                self._sessions[step.session] = member

    def drain(self, patience_s: float) -> None:
        """Have every trunk finish the step that clients have contributed to, and end.

        Args:
            patience_s: The longest time to wait for the other clients of these steps, in seconds.
        """
        wait([service.engine.drain() for service in self._services.values()], timeout=patience_s)

    def _info(self, request: m.ServiceInfoRequest, token: str) -> m.ServiceInfoReply:
        service = self._services[self._name(request.served_model_name)]
        info = replace(service.handle(request, ""), served_model_names=tuple(self._services))
        try:
            self.check_token(token)
        except Unauthenticated:
            return info
        clients = f"{self.num_clients} of {self._max_clients}"
        return replace(info, budgets={"limits.clients": clients, **service.budgets()})

    # --- clients and sessions -----------------------------------------------------------------

    def _open(self, request: m.OpenRequest, server: str) -> m.OpenReply:
        member = self._admitted(self._name(request.served_model_name), request.client)
        # Not under the lock: Open waits for the engine, and other trunks' clients must not.
        try:
            reply: Any = member.service.handle(request, server or member.token)
            with self._lock:
                member.sessions.add(reply.session)
                self._sessions[reply.session] = member
        finally:
            with self._lock:
                member.opening -= 1
        return reply  # type: ignore[no-any-return]

    def _name(self, served_model_name: str) -> str:
        name = served_model_name or next(iter(self._services))
        if name not in self._services:
            raise ModelMismatch(
                f"no trunk is served as {name!r} here; there is {', '.join(self._services)}"
            )
        return name

    def _admitted(self, name: str, client: str) -> _Member:
        with self._lock:
            self._forget_absent()
            member = self._clients.get((name, client))
            if member is None:
                self._require_room()
                service = self._services[name]
                member = self._clients[name, client] = _Member(
                    name=name,
                    client=client,
                    service=service,
                    token=service.admit(client),
                    heard_at=self._clock(),
                )
            self._heard(member)
            member.opening += 1
            # The service ends sessions that are idle, or that make room for others.
            for session in [each for each in member.sessions if not member.service.has(each)]:
                self._forget_session(session)
            return member

    def _member_of(self, session: str) -> _Member:
        with self._lock:
            member = self._sessions.get(session)
            if member is None:
                raise no_session(session)
            self._heard(member)
            return member

    def _heard(self, member: _Member) -> None:
        member.heard_at = self._clock()
        key = member.name, member.client
        # A request of a client that was forgotten a moment ago finds no session.
        if key in self._clients:
            self._clients[key] = self._clients.pop(key)

    def _end(self, session: str) -> None:
        with self._lock:
            self._forget_session(session)

    def _forget_session(self, session: str) -> None:
        if member := self._sessions.pop(session, None):
            member.sessions.discard(session)

    def _forget_absent(self) -> None:
        # Not at once: a client that was disconnected may repeat the request of its last step.
        oldest = self._clock() - self._forget_after_s
        for member in list(self._clients.values()):
            if member.heard_at >= oldest:
                return
            self._forget(member)

    def _require_room(self) -> None:
        if len(self._clients) < self._max_clients:
            return
        if not any(self._forget(member) for member in list(self._clients.values())):
            raise Overloaded(
                f"{self._max_clients} clients have sessions here, which is the most "
                "(limits.clients); try again when one has left, or raise the limit at the trunk"
            )

    def _forget(self, member: _Member) -> bool:
        """Forget a client; return False if it has a session, or opens one."""
        if member.opening or not member.service.forget(member.client):
            return False
        del self._clients[member.name, member.client]
        for session in list(member.sessions):
            self._forget_session(session)
        return True
