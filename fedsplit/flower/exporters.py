"""The metrics of this process: one address for the server of a run and for its inline clients."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock

from fedsplit.errors import ConfigError
from fedsplit.telemetry.prometheus import MetricsServer, Prometheus
from fedsplit.telemetry.sinks import Telemetry

log = logging.getLogger("flwr.fedsplit")

_WHAT = "launch.metrics="


@dataclass(slots=True, kw_only=True)
class _Exporter:
    sink: Prometheus
    server: MetricsServer
    users: int = 0


_EXPORTERS: dict[str, _Exporter] = {}
"""The exporters that are in use, by the address that was asked for."""
_LOCK = Lock()


@contextmanager
def exporting(address: str, *, certificate: str = "") -> Iterator[Telemetry]:
    """A context in which metrics are served at an address; yields telemetry, silent for "".

    A second context of the same address in this process shares the metrics of the first one.

    Args:
        address: host:port, or empty.
        certificate: The PEM file of the server's certificate, if it has one.

    Raises:
        ConfigError: The address is taken, or is none; or `prometheus-client` is not installed.
    """
    if not address:
        yield Telemetry()
        return
    with _LOCK:
        exporter = _EXPORTERS.get(address)
        if exporter is None:
            sink = Prometheus(_WHAT, certificate=certificate)
            exporter = _Exporter(sink=sink, server=MetricsServer(_WHAT, address, sink))
            _EXPORTERS[address] = exporter
            log.info("Metrics are at http://%s/metrics", exporter.server.address)
        exporter.users += 1
    try:
        yield Telemetry(exporter.sink)
    finally:
        with _LOCK:
            exporter.users -= 1
            if not exporter.users:
                del _EXPORTERS[address]
                exporter.server.close()


@contextmanager
def exporting_if_free(address: str) -> Iterator[Telemetry]:
    """As `exporting`, but without metrics if they cannot be served.

    So a client trains while another process of its machine has the address.
    """
    with ExitStack() as opened:
        try:
            telemetry = opened.enter_context(exporting(address))
        except ConfigError as exc:
            log.warning("This client has no metrics: %s", exc)
            telemetry = Telemetry()
        yield telemetry
