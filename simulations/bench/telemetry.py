"""The cost of metrics and traces: steps of training with and without them, and what they take.

Client and server share this process and talk over loopback. Times are those of the processor, of
all threads. The difference between steps with and without them, which the rows have, is smaller
than what a step varies by. So the events of a step are made and taken again many times, and the
figures are their time over a step's: for metrics with that of a reading as often as `deploy/` asks
for one, and for traces with one step of a hundred traced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from urllib.request import urlopen

from fedsplit.client.metered import MeteredLink
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.data.batches import Batch
from fedsplit.model import ClientPart, connect
from fedsplit.telemetry.events import Event, SpanEnded
from fedsplit.telemetry.otlp import TraceFile
from fedsplit.telemetry.prometheus import MetricsServer, Prometheus
from fedsplit.telemetry.sinks import SILENT, Sink, Telemetry
from fedsplit.telemetry.spans import span
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.state import state_of
from simulations.bench.models import TOY, Shape
from simulations.bench.processes import threads_of_torch
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import name_of

SHARE = 0.01
"""The share of the steps that are traced."""

READ_EVERY_S = 5.0
"""The seconds from one reading to the next in `deploy/prometheus/prometheus.yml`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, the turns of one step each, and how often events and readings are repeated."""

    shape: Shape
    turns: int
    repeats: int


SIZES = {
    "full": Size(
        shape=Shape(
            blocks=8, hidden=256, heads=4, vocabulary=4096, split="1/6/1", rows=4, tokens=64
        ),
        turns=20,
        repeats=200,
    ),
    "toy": Size(shape=replace(TOY, rows=2, tokens=16), turns=2, repeats=2),
}


def measure(size: str) -> Report:
    """Return the time of a step and of what telemetry does for it, over the step's."""
    what, report = SIZES[size], Report()
    with threads_of_torch(1), ExitStack() as opened:
        folder = Path(opened.enter_context(TemporaryDirectory()))
        model, sink, kept, spans = what.shape.client(), Prometheus("metrics "), Kept(), Kept()
        server = opened.enter_context(closing(MetricsServer("metrics ", "127.0.0.1:0", sink)))
        file = opened.enter_context(closing(_trace_file(folder, 1.0)))
        variants = {"without": SILENT, "with": Telemetry(sink, kept)}
        variants["traced"] = Telemetry(file, spans)
        measures = dict[str, Callable[[], float]]()
        for name, telemetry in variants.items():
            client = opened.enter_context(_client(model, what.shape, telemetry))
            measures[name] = partial(_seconds, model, *client, what.shape.batch())
        found = in_turns(what.turns, measures)
        step_s = report.spread("step_s", found["without"], metrics="without")
        report.spread("step_s", found["with"], metrics="with")
        report.spread("step_s", found["traced"], metrics="traced, all steps")
        report.ratio("with / without", found["with"], found["without"])
        report.ratio("traced / without", found["traced"], found["without"])
        kept.events.clear()
        measures["with"]()
        emit = partial(_emit_s, kept.events, Telemetry(sink))
        events_s = report.spread(
            "events_s", [emit() for _ in range(what.repeats)], count=len(kept.events)
        )
        spans.events.clear()
        measures["traced"]()
        traced_s, untraced_s = _tracing(report, spans.events, folder, what.repeats)
        read = partial(_reading_s, server.address)
        reading_s = report.spread("reading_s", [read() for _ in range(what.repeats)])
    report.figures["metrics_overhead"] = 1.0 + events_s / step_s + reading_s / READ_EVERY_S
    report.figures["trace_overhead_1pct"] = 1.0 + (SHARE * traced_s + untraced_s) / step_s
    return report


def _tracing(
    report: Report, events: Sequence[Event], folder: Path, repeats: int
) -> tuple[float, float]:
    """Return the seconds for the spans of a traced step, and those for a step that is not traced.

    Where steps may be traced, those that are not cost something too: an id is drawn for each span
    that would be the first, and other events are made, which the file ignores.
    """
    spans = [event for event in events if isinstance(event, SpanEnded)]
    others = [event for event in events if not isinstance(event, SpanEnded)]

    def traced() -> float:
        began = process_time()
        file = _trace_file(folder, 1.0)
        _emit_s(spans, Telemetry(file))
        file.close()
        return process_time() - began

    def untraced(telemetry: Telemetry) -> float:
        began = process_time()
        for each in spans:
            with span(telemetry, each.name):
                pass
        return process_time() - began + _emit_s(others, telemetry)

    with closing(_trace_file(folder, 0.0)) as never:
        traced_s = report.spread("traced_s", [traced() for _ in range(repeats)], count=len(spans))
        times = [untraced(Telemetry(never)) for _ in range(repeats)]
        return traced_s, report.spread("untraced_s", times, count=len(spans))


def _trace_file(folder: Path, share: float) -> TraceFile:
    return TraceFile("traces ", folder, name="bench", share=share)


class Kept(Sink):
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)


@contextmanager
def _client(
    model: ClientPart, shape: Shape, telemetry: Telemetry
) -> Iterator[tuple[ClientTrainer, RemoteTrunk]]:
    """Serve a trunk, open a session with it, and yield a trainer of the model and the trunk."""
    run = shape.run
    with TrunkService(shape.trunk(), run) as service:
        service.engine.meter.telemetry = telemetry
        telemetry.watch("", lambda: state_of(service))
        server = GrpcServer(
            service, wire=run.wire, limits=service.limits, max_clients=2, telemetry=telemetry
        )
        near = GrpcLink(server.start(), token=service.admit(name_of(0)), wire=run.wire)
        with closing(near):
            link = MeteredLink(near, telemetry) if telemetry else near
            trunk = RemoteTrunk(link, model, run, client=name_of(0))
            with trunk.session():
                yield ClientTrainer(model, trunk, run, telemetry=telemetry), trunk
        server.stop()


def _seconds(model: ClientPart, trainer: ClientTrainer, trunk: RemoteTrunk, batch: Batch) -> float:
    """Return the processor's seconds of a step, until the trunk has taken it too."""
    # Both variants share one client model, so each turn connects its own trunk.
    connect(model, trunk)
    began = process_time()
    trainer.step([batch])
    # The reply to a step may arrive before the trunk has taken it; this call waits for it.
    trunk.gradients()
    return process_time() - began


def _emit_s(events: Sequence[Event], telemetry: Telemetry) -> float:
    """Return the seconds to make events and to count them."""
    began = process_time()
    for event in events:
        telemetry.emit(replace(event))
    return process_time() - began


def _reading_s(address: str) -> float:
    began = process_time()
    with urlopen(f"http://{address}/metrics", timeout=10) as reply:
        reply.read()
    return process_time() - began
