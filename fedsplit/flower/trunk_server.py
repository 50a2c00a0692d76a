"""The trunk's server beside Flower: starts and stops the trunk service with its gRPC server."""

from contextlib import ExitStack
from dataclasses import replace

from fedsplit.errors import ConfigError
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.state import state_of
from fedsplit.trunk.update import TrunkUpdate


class TrunkServer:
    """Serves a trunk to the clients of a run while its context is entered.

    Args:
        trunk: The trunk part; it trains while the context is entered.
        run: The run.
        update: Makes a step of the trunk from the clients' gradients.

    Attributes:
        service: The service; its engine has the state of training.
        address: The address that clients call, while the context is entered.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        *,
        update: type[TrunkUpdate] = TrunkUpdate,
    ) -> None:
        self.address = ""
        self._telemetry = SILENT
        self._trunk = trunk
        self._run = run
        self._update = update
        self._wire = run.wire
        self._open = ExitStack()
        self.renew()

    def renew(self) -> None:
        """Replace the service by a new one, as if the process had begun again.

        Call it outside of the context. Clients of the old service have no valid token any more. The
        new one is served at the same address, so that they learn this at once.
        """
        self.service = TrunkService(self._trunk, self._run, update=self._update)
        self.service.engine.meter.telemetry = self._telemetry

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
            self._open = opening.pop_all()
        return self

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
            max_clients=self._run.limits.streams_per_client * self._run.clients,
            budgets=self._run.limits,
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
