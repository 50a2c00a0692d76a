"""Where the events of this process go: metrics at an address, traces in a folder, and the log.

The server of a run and its inline clients share one address, and the metrics there.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fedsplit.errors import ConfigError
from fedsplit.telemetry.logs import span_sinks
from fedsplit.telemetry.otlp import TraceFile
from fedsplit.telemetry.prometheus import MetricsServer, Prometheus
from fedsplit.telemetry.sinks import Sink, Telemetry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where the events of a process go, besides the log.

    Attributes:
        metrics: The address, host:port, at which Prometheus reads metrics; empty for none.
        traces: The folder of traces; empty for none.
        trace_share: The share of the traces that are written.
        certificate: The PEM file of the server's certificate, if it has one.
        clients: The names of the clients that have a label of their own in metrics.
        asked_by: The settings of `metrics` and `traces`, for errors.
    """

    metrics: str = ""
    traces: str = ""
    trace_share: float = 1.0
    certificate: str = ""
    clients: tuple[str, ...] = ()
    asked_by: tuple[str, str] = ("launch.metrics=", "launch.traces=")

    @contextmanager
    def opened(
        self, name: str, *, needed: bool = True, announce: Callable[[str], None] = log.info
    ) -> Iterator[Telemetry]:
        """A context in which events go there; yields what takes them.

        Args:
            name: Whose events these are: server, or the client's name.
            needed: Whether all must open. Otherwise the events go where they can, so that a client
                trains while another process of its machine has the address.
            announce: Told where the metrics are.

        Raises:
            ConfigError: The address is taken or none, the folder cannot be written, or a library
                is not installed.
        """
        traces = self.asked_by[1]
        with ExitStack() as stack:
            telemetry = stack.enter_context(closing(Telemetry(*span_sinks())))
            try:
                if self.metrics:
                    telemetry.add(stack.enter_context(self._metrics(announce)))
            except ConfigError as exc:
                _refuse(exc, "metrics", needed)
            try:
                if self.traces:
                    folder, share = Path(self.traces), self.trace_share
                    telemetry.add(TraceFile(traces, folder, name=name, share=share))
            except ConfigError as exc:
                _refuse(exc, "traces", needed)
            yield telemetry

    @contextmanager
    def _metrics(self, announce: Callable[[str], None]) -> Iterator[Sink]:
        """A context in which metrics are served; a second one shares those of the first."""
        with _LOCK:
            exporter = _EXPORTERS.get(self.metrics)
            if exporter is None:
                what = self.asked_by[0]
                sink = Prometheus(what, certificate=self.certificate, clients=self.clients)
                exporter = _Exporter(sink=sink, server=MetricsServer(what, self.metrics, sink))
                _EXPORTERS[self.metrics] = exporter
                announce(f"metrics at http://{exporter.server.address}/metrics")
            exporter.users += 1
        try:
            yield exporter.sink
        finally:
            with _LOCK:
                exporter.users -= 1
                if not exporter.users:
                    del _EXPORTERS[self.metrics]
                    exporter.server.close()


def _refuse(reason: ConfigError, what: str, needed: bool) -> None:
    if needed:
        raise reason
    log.warning("This client has no %s: %s", what, reason)


@dataclass(slots=True, kw_only=True)
class _Exporter:
    sink: Prometheus
    server: MetricsServer
    users: int = 0


_EXPORTERS: dict[str, _Exporter] = {}
"""The exporters that are in use, by the address that was asked for."""
_LOCK = Lock()
