"""The metrics of a process for Prometheus: a sink that counts events, and the address to read it.

`prometheus-client` is an extra, so the functions that need it import it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product
from threading import Lock
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.telemetry import readings
from fedsplit.telemetry.events import (
    ClientStepTaken,
    Contributed,
    Event,
    FramesMoved,
    PassRun,
    RequestAnswered,
    RequestRetried,
    RunBegan,
    StepTaken,
    TokenArrived,
    TrunkState,
)
from fedsplit.telemetry.metrics import EVENTS, METRICS, OTHERS, REQUESTS, Metric
from fedsplit.telemetry.readings import Reading
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


class Prometheus(Sink):
    """Counts events, and reads the states of trunks, as the table of metrics says.

    Args:
        what: The setting that asks for metrics, for errors: "--metrics ".
        certificate: The PEM file of the server's certificate; empty without TLS.
        clients: The names of clients that have a label of their own, in the metrics `by_client`;
            other clients share a label there. Without names there is no such label.

    Attributes:
        registry: The registry of the client library.

    Raises:
        ConfigError: `prometheus-client` is not installed.
    """

    def __init__(self, what: str, *, certificate: str = "", clients: Iterable[str] = ()) -> None:
        self._library = library = _library(what)
        # The time at which a counter was made would be a further series for each.
        library.disable_created_metrics()
        self.registry: Any = library.CollectorRegistry()
        # Once: the server goes on with the one that it has read at its start.
        self._certificate = tuple(readings.of_certificate(certificate) if certificate else ())
        self._trunks: dict[str, Callable[[], TrunkState]] = {}
        self._run: RunBegan | None = None
        self._round: RoundStats | None = None
        self._step: StepTaken | None = None
        self._eval_loss = math.nan
        self._lock = Lock()
        self._clients = frozenset(clients)
        self._metrics = {
            metric.name.removeprefix("fedsplit_"): self._made(library, metric) for metric in EVENTS
        }
        for request in REQUESTS:
            self._metrics["requests_total"].labels(request, "OK")
        self.registry.register(self)

    def _made(self, library: Any, metric: Metric) -> Any:
        """Return a metric of the library, with the values of its labels that are known."""
        kind = {"counter": library.Counter, "histogram": library.Histogram}[metric.kind]
        options = {"buckets": metric.buckets} if metric.buckets else {}
        known = [metric.known] if metric.known else []
        labels = metric.labels
        if metric.by_client and self._clients:
            known.append((*sorted(self._clients), OTHERS))
            labels = (*labels, "client")
        made = kind(metric.name, metric.text, labels, registry=self.registry, **options)
        for values in product(*known) if known else ():
            made.labels(*values)
        return made

    def _of(self, client: str, name: str, *labels: str) -> Any:
        """Return the part of a metric `by_client` that counts what this client does."""
        if self._clients:
            labels = (*labels, client if client in self._clients else OTHERS)
        metric = self._metrics[name]
        return metric.labels(*labels) if labels else metric

    def watch(self, name: str, state: Callable[[], TrunkState]) -> None:
        """Read the state of the trunk `name` whenever Prometheus asks."""
        self._trunks[name] = state

    def on_event(self, event: Event) -> None:
        """Count an event."""
        metrics = self._metrics
        match event:
            case RequestAnswered():
                metrics["requests_total"].labels(event.kind, event.code).inc()
                metrics["request_duration_seconds"].labels(event.kind).observe(event.seconds)
            case FramesMoved():
                received, sent = metrics["received_bytes_total"], metrics["sent_bytes_total"]
                received.labels(event.kind, event.received_codec).inc(event.received_bytes)
                sent.labels(event.kind, event.sent_codec).inc(event.sent_bytes)
            case PassRun():
                for seconds in event.queues_s:
                    metrics["queue_duration_seconds"].labels(event.kind).observe(seconds)
                metrics["compute_duration_seconds"].labels(event.kind).observe(event.compute_s)
                metrics["pass_sessions"].labels(event.kind).observe(event.sessions)
                metrics["tokens_total"].labels(event.kind).inc(event.tokens)
            case Contributed():
                self._of(event.client, "contributions_total", event.outcome).inc()
                if event.outcome in ("used", "late"):
                    staleness = self._of(event.client, "contribution_staleness_steps")
                    staleness.observe(event.staleness)
            case StepTaken():
                self._step = event
                metrics["steps_total"].inc(event.taken)
                for client, seconds in zip(event.clients, event.waits_s, strict=False):
                    self._of(client, "barrier_wait_seconds").observe(seconds)
            case RoundStats() | RunBegan():
                self._on_run(event)
            case ClientStepTaken() | RequestRetried() | TokenArrived():
                self._on_client(event)

    def _on_client(self, event: ClientStepTaken | RequestRetried | TokenArrived) -> None:
        metrics = self._metrics
        match event:
            case ClientStepTaken():
                client = event.client
                self._of(client, "client_step_duration_seconds").observe(event.seconds)
                self._of(client, "client_samples_total").inc(event.samples)
                self._of(client, "client_tokens_total").inc(event.tokens)
            case RequestRetried():
                metrics["client_retries_total"].labels(event.code).inc()
            case TokenArrived(is_first=True):
                metrics["client_time_to_first_token_seconds"].observe(event.seconds)
            case TokenArrived():
                metrics["client_time_between_tokens_seconds"].observe(event.seconds)

    def _on_run(self, event: RunBegan | RoundStats) -> None:
        with self._lock:
            if isinstance(event, RunBegan):
                self._run, self._round, self._eval_loss = event, None, math.nan
                return
            self._round = event
            if not math.isnan(event.eval_loss):
                self._eval_loss = event.eval_loss

    def exposition(self) -> tuple[bytes, str]:
        """Return the metrics as Prometheus reads them, and the content type."""
        return self._library.generate_latest(self.registry), self._library.CONTENT_TYPE_LATEST

    # --- what the client library reads --------------------------------------------------------

    def describe(self) -> list[Any]:
        """Return nothing: the library would otherwise read all values to learn the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics that are read when Prometheus asks."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for short, labels, value in self._readings():
            metric = METRICS[f"fedsplit_{short}"]
            if short not in families:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[short] = kind(metric.name, metric.text, labels=metric.labels)
            families[short].add_metric(labels, value)
        yield from families.values()

    def _readings(self) -> Iterator[Reading]:
        yield from readings.of_build()
        yield from chain.from_iterable(
            readings.of_trunk(name, state()) for name, state in tuple(self._trunks.items())
        )
        if step := self._step:
            yield from readings.of_step(step)
        with self._lock:
            run, stats, eval_loss = self._run, self._round, self._eval_loss
        if run and stats:
            yield from readings.of_round(run, stats, eval_loss)
        yield from self._certificate
        yield from readings.of_gpus()


class MetricsServer:
    """Serves the metrics of a process at http://ADDRESS/metrics, until it is closed.

    Args:
        what: The setting that has the address, for errors: "--metrics ".
        address: The address, host:port; port 0 is a free port.
        sink: The metrics.

    Attributes:
        address: The address that it listens on.

    Raises:
        ConfigError: The address is not one, or is taken.
    """

    def __init__(self, what: str, address: str, sink: Prometheus) -> None:
        found = _ADDRESS.fullmatch(address)
        if not found or int(found[2]) > 65535:
            raise ConfigError(f"{what}{address} is not host:port; give such as 127.0.0.1:9600")
        host = found[1].strip("[]")
        try:
            self._server, self._thread = _library(what).start_http_server(
                int(found[2]), host, sink.registry
            )
        except OSError as exc:
            raise ConfigError(
                f"{what}{address} cannot be listened on: {exc.strerror or exc}; choose another "
                "address, or port 0 for a free port"
            ) from exc
        self.address = f"{found[1]}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _library(what: str) -> Any:
    try:
        import prometheus_client
    except ImportError as exc:
        raise ConfigError(
            f"{what.rstrip(' =')} needs prometheus-client, which is not installed here: pip "
            "install 'fedsplit[metrics]', or leave the setting out"
        ) from exc
    return prometheus_client
