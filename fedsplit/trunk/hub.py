"""Several trunks behind one door: each a service of its own, which a client chooses at Open."""

import hmac
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from threading import Lock
from typing import Any

from fedsplit.errors import ConfigError, ModelMismatch, SessionLost, Unauthenticated
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.sessions import no_session
from fedsplit.wire import messages as m


@dataclass(slots=True, kw_only=True, eq=False)
class _Guest:
    """A client at one of the trunks: the token that this one knows it by, and its sessions."""

    client: str
    service: TrunkService
    token: str
    heard: float
    sessions: set[str] = field(default_factory=set)


class TrunkHub:
    """Serves trunks by name, to all who hold one token; implements `fedsplit.link.Service`.

    Engine, optimizer and the parameters that train are each trunk's own. A client is who it says
    it is when it opens a session: who holds the token is trusted that far, and takes a name that
    nobody else has. From then on the session's name, which is a secret, says who asks.

    Args:
        services: The trunks by name; who names none gets the first.
        token: What every client has to present; empty for a door that is open.
        clock: Seconds that do not run backwards.
        forget_after_s: A client that has no session and says nothing for so long is forgotten.

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
    ) -> None:
        if not services:
            raise ConfigError("there is no trunk to serve; name at least one")
        self._services = dict(services)
        self._token = token
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._guests: dict[tuple[str, str], _Guest] = {}
        self._hosts: dict[str, _Guest] = {}
        self._lock = Lock()
        self._open_services = ExitStack()

    def __enter__(self) -> "TrunkHub":
        with ExitStack() as opening:
            for service in self._services.values():
                opening.enter_context(service)
            self._open_services = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open_services.close()

    @property
    def limits(self) -> m.Limits:
        """The largest of what any of the trunks takes."""
        each = [service.limits for service in self._services.values()]
        names = [limit.name for limit in fields(m.Limits)]
        return m.Limits(**{name: max(getattr(one, name) for one in each) for name in names})

    @property
    def num_guests(self) -> int:
        """Clients that are remembered, each once for every trunk it came for."""
        return len(self._guests)

    # --- fedsplit.link.Service ----------------------------------------------------------------

    def check_token(self, token: str) -> None:
        """Let only holders of the token in; see `fedsplit.link.Service`."""
        if self._token and not hmac.compare_digest(token.encode(), self._token.encode()):
            raise Unauthenticated(
                "the token is missing or not the one of this trunk server; present the one that "
                "it was started with"
            )

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        if isinstance(request, m.ServiceInfoRequest):
            told = self._services[self._name(request.served)].handle(request, "")
            return replace(told, served=tuple(self._services))  # type: ignore[return-value]
        self.check_token(token)
        if isinstance(request, m.OpenRequest):
            return self._open(request)  # type: ignore[return-value]
        session: str = getattr(request, "session", "")
        guest = self._host_of(session)
        try:
            reply = guest.service.handle(request, guest.token)
        except SessionLost:
            self._end(session)
            raise
        if isinstance(request, m.CloseRequest):
            self._end(session)
        return reply

    def disconnected(self, session: str) -> None:
        """Tell the session's trunk; see `fedsplit.link.Service`."""
        with self._lock:
            guest = self._hosts.get(session)
        if guest:
            guest.service.disconnected(session)

    # --- who is where -------------------------------------------------------------------------

    def _open(self, request: m.OpenRequest) -> m.OpenReply:
        guest = self._welcome(self._name(request.served), request.client)
        reply: Any = guest.service.handle(request, guest.token)
        with self._lock:
            guest.sessions.add(reply.session)
            self._hosts[reply.session] = guest
        return reply  # type: ignore[no-any-return]

    def _name(self, served: str) -> str:
        name = served or next(iter(self._services))
        if name not in self._services:
            raise ModelMismatch(
                f"no trunk is served as {name!r} here; there is {', '.join(self._services)}"
            )
        return name

    def _welcome(self, name: str, client: str) -> _Guest:
        with self._lock:
            self._forget_who_left()
            guest = self._guests.get((name, client))
            if guest is None:
                service = self._services[name]
                guest = self._guests[name, client] = _Guest(
                    client=client,
                    service=service,
                    token=service.admit(client),
                    heard=self._clock(),
                )
            guest.heard = self._clock()
            return guest

    def _host_of(self, session: str) -> _Guest:
        with self._lock:
            guest = self._hosts.get(session)
            if guest is None:
                raise no_session(session)
            guest.heard = self._clock()
            return guest

    def _end(self, session: str) -> None:
        with self._lock:
            if guest := self._hosts.pop(session, None):
                guest.sessions.discard(session)

    def _forget_who_left(self) -> None:
        # Not at once: a client that was cut off may ask again what became of its last step.
        oldest = self._clock() - self._forget_after_s
        for key, guest in list(self._guests.items()):
            if guest.heard < oldest and guest.service.dismiss(guest.client):
                del self._guests[key]
                for session in guest.sessions:
                    del self._hosts[session]
