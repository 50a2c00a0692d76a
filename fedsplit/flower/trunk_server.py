"""The trunk's server beside Flower: starts and stops the trunk service with its gRPC server."""

import secrets
from contextlib import ExitStack
from dataclasses import replace

from fedsplit.errors import ConfigError
from fedsplit.flower.followers import Followers
from fedsplit.flower.rank import shard_on
from fedsplit.flower.share import Preparation
from fedsplit.model.lora import trainable
from fedsplit.model.stage import TrunkPart
from fedsplit.ranks.group import Ranks
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.replicas import TRAINED
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.shards import group_of
from fedsplit.trunk.state import state_of
from fedsplit.trunk.turns import RENEW, Order
from fedsplit.trunk.update import TrunkUpdate

NOTHING = Preparation(tokenizer="", labels=())
"""The preparation of a run without further servers."""

_STREAMS = 4
"""The streams that a follower may have at a time; after a loss, two of them are dead."""


class TrunkServer:
    """Serves a trunk to the clients of a run while its context is entered.

    Args:
        trunk: The trunk part; it trains while the context is entered.
        run: The run.
        preparation: The tokenizer and classes of the run, for its further servers.
        update: Makes a step of the trunk from the clients' gradients.

    Attributes:
        service: The service; its engine has the state of training.
        address: The address of this server, while the context is entered.

    Raises:
        ConfigError: The run has several trunk servers, and its method cannot share their steps.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        preparation: Preparation = NOTHING,
        *,
        update: type[TrunkUpdate] = TrunkUpdate,
    ) -> None:
        if run.launch.trunk_servers > 1 and (update.replicas or update.keeps_passes):
            raise ConfigError(
                f"launch.trunk_servers={run.launch.trunk_servers} shares the steps of one trunk, "
                f"but with {run.strategy.target} clients have trunks of their own or the trunk "
                "repeats their passes; use strategy=splitfed_v2, or launch.trunk_servers=1"
            )
        self.address = ""
        self._preparation = preparation
        self._places: dict[str, int] = {}
        self._telemetry = SILENT
        self._trunk = trunk
        self._run = run
        self._update = update
        self._wire = run.wire
        self._open = ExitStack()
        self._ranks: Ranks | None = None
        self._shard = trunk
        self.service = self._new_service()

    def cut_over(self, ranks: Ranks) -> None:
        """Have several ranks compute the trunk from now on, each with its shard.

        The trunk part itself keeps its values until `collect`. Call it outside of the context.

        Raises:
            UnsupportedModel: The family cannot be cut over ranks.
        """
        self._shard = shard_on(ranks, self._run, self._trunk.config)
        self._ranks = ranks
        self.service = self._new_service()
        ranks.begin(group_of(self._shard))

    def collect(self) -> None:
        """Copy what the ranks have trained to the trunk part; call it outside of the context."""
        if self._ranks is None:
            return
        state, trained = self.service.engine.state(), trainable(self._trunk)
        for name, parameter in trained.items():
            parameter.data.copy_(state[TRAINED + name])

    def renew(self) -> None:
        """Replace the service by a new one, as if the process had begun again.

        Call it outside of the context. Clients of the old service have no valid token any more. The
        new one is served at the same address, so that they learn this at once.
        """
        if self._ranks:
            self._ranks.send(Order(RENEW))
        self.service = self._new_service()

    def _new_service(self) -> TrunkService:
        self._servers_token = secrets.token_urlsafe(24)
        service = TrunkService(
            self._shard,
            self._run,
            update=self._update,
            servers_token=self._servers_token,
            channel=self._ranks,
        )
        self._followers = Followers(self._run, self._preparation, service.followers.is_alive)
        service.engine.meter.telemetry = self._telemetry
        if self._ranks:
            self._ranks.on_lost = service.engine.lose
        return service

    def observe(self, telemetry: Telemetry) -> None:
        """Report the events of the trunk, and of its server; call it outside of the context."""
        self._telemetry = self.service.engine.meter.telemetry = telemetry
        telemetry.watch("", lambda: state_of(self.service))

    def __enter__(self) -> "TrunkServer":
        with ExitStack() as opening:
            opening.enter_context(self.service)
            # Contexts close in reverse order: the server stops first, so no call finds a closed
            # service.
            opening.callback(self._started().stop)
            opening.callback(self.service.followers.close)
            opening.callback(self._followers.stop)
            self._followers.start(self.address, self._servers_token)
            self._open = opening.pop_all()
        return self

    def addresses_for(self, client: str) -> list[str]:
        """Return the addresses of all servers that serve, beginning with that of a client.

        Clients go to the servers in turn, in the order in which they are asked for first.
        """
        servers = [self.address, *self._followers.addresses()]
        place = self._places.setdefault(client, len(self._places)) % len(servers)
        return servers[place:] + servers[:place]

    def _started(self) -> GrpcServer:
        """Start a server at the address of the one before, or at that of the run."""
        try:
            return self._started_at(self._wire)
        except ConfigError:
            if self._wire == self._run.wire:
                raise
            # Another process has taken the port. Clients get the new address in their next round.
            return self._started_at(self._run.wire)

    def _started_at(self, wire: WireSpec) -> GrpcServer:
        server = GrpcServer(
            self.service,
            wire=wire,
            limits=self.service.limits,
            # As many as all clients may have, so that none can take the place of another.
            max_clients=self._run.limits.streams_per_client * self._run.clients
            + _STREAMS * (self._run.launch.trunk_servers - 1),
            budgets=self._run.limits,
            payload_of=self.service.followers.payload_of,
            telemetry=self._telemetry,
        )
        with ExitStack() as opening:
            opening.callback(server.stop)
            bound = server.start()
            opening.pop_all()
        self.address = wire.advertise or bound
        self._wire = replace(wire, bind=bound)
        return server

    def __exit__(self, *_: object) -> None:
        self._open.close()
