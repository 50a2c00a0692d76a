"""Spans: what is in a trace, what decides that there is one, and that nothing is made without."""

import json
import random
import secrets
import sys

import pytest

from fedsplit.client.metered import MeteredLink
from fedsplit.client.rpc import RpcClient
from fedsplit.errors import ConfigError, ConnectionLost, ProtocolError, SessionLost
from fedsplit.link import Link
from fedsplit.spec import RunSpec, TrainSpec, WireSpec
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.events import Event, SpanEnded
from fedsplit.telemetry.otlp import TraceFile
from fedsplit.telemetry.sinks import SILENT, Sink, Telemetry
from fedsplit.telemetry.spans import (
    UNTRACED,
    SpanContext,
    continued,
    current,
    sent_ids,
    span,
)
from fedsplit.wire.delta import DeltaEncoder
from fedsplit.wire.messages import CloseReply, CloseRequest


class Spans(Sink):
    """Keeps the spans of traces, of all or of none."""

    takes_traces = True

    def __init__(self, wants: bool = True) -> None:
        self.wants = wants
        self.ended: list[SpanEnded] = []

    def wants_trace(self, trace_id: bytes) -> bool:
        return self.wants

    def on_event(self, event: Event) -> None:
        if isinstance(event, SpanEnded):
            self.ended.append(event)


def test_spans_below_each_other_are_one_trace_with_the_fields_of_their_thread():
    kept = Spans()
    with working_on(client="client-0", step=3), span(Telemetry(kept), "train_step") as step:
        with span(SILENT, "forward", session="0123456789abcdef", call=7) as forward:
            assert current() is forward and sent_ids() == bytes(forward.context)
            forward.record("compute", seconds=0.25, ago_s=1.0)
        with pytest.raises(SessionLost), span(SILENT, "backward"):
            raise SessionLost("gone")
    assert current() is UNTRACED and sent_ids() == b""
    compute, first, second, root = kept.ended
    assert {each.trace_id for each in kept.ended} == {step.context.trace_id}
    parents = [each.parent_id for each in kept.ended]
    assert parents == [first.span_id, root.span_id, root.span_id, b""]
    assert [each.name for each in kept.ended] == ["compute", "forward", "backward", "train_step"]
    assert [each.code for each in kept.ended] == ["OK", "OK", "SESSION_LOST", "OK"]
    assert root.fields == {"client": "client-0", "step": 3}
    assert first.fields == {**root.fields, "session": "01234567", "call": 7}
    assert compute.ended_ns - compute.began_ns == 250_000_000
    assert 0.9e9 < first.ended_ns - compute.ended_ns < 2e9
    assert root.began_ns <= first.began_ns <= first.ended_ns <= root.ended_ns


@pytest.mark.parametrize("telemetry", [SILENT, Telemetry(Spans(wants=False))])
def test_nothing_is_made_or_sent_for_a_trace_that_nobody_wants(telemetry):
    with span(telemetry, "train_step") as untraced:
        assert untraced.below("x") is UNTRACED and current() is untraced or untraced is UNTRACED
        assert sent_ids() == b""
    sender = SpanContext(secrets.token_bytes(16), secrets.token_bytes(8))
    assert continued(telemetry, sender, "serve") is UNTRACED


def test_a_request_continues_the_trace_of_its_sender():
    kept = Spans()
    sender = SpanContext(secrets.token_bytes(16), secrets.token_bytes(8))
    with continued(Telemetry(kept), SpanContext.read(bytes(sender)), "serve", kind="forward"):
        pass
    (serve,) = kept.ended
    assert (serve.trace_id, serve.parent_id) == (sender.trace_id, sender.span_id)
    assert SpanContext.read(b"") is None
    with pytest.raises(ProtocolError, match="a trace of 23 bytes; it has 24 or none"):
        SpanContext.read(bytes(23))


def test_the_id_alone_decides_whether_a_trace_is_of_the_share(tmp_path):
    ids = [random.Random(number).randbytes(16) for number in range(4000)]
    files = [TraceFile("", tmp_path, name=f"{number}", share=0.1) for number in range(2)]
    never, always = (TraceFile("", tmp_path, name="x", share=share) for share in (0.0, 1.0))
    wanted = [[each for each in ids if file.wants_trace(each)] for file in files]
    assert wanted[0] == wanted[1] and 340 < len(wanted[0]) < 460
    assert not any(map(never.wants_trace, ids)) and all(map(always.wants_trace, ids))
    for file in (*files, never, always):
        file.close()


def test_without_the_library_or_the_folder_an_error_says_what_to_do(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=f"^--traces {file}/x cannot be written: "):
        TraceFile("--traces ", file / "x", name="server", share=1.0)
    # None stands for a module that is not installed.
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.json.file.trace_exporter", None)
    with pytest.raises(ConfigError, match="pip install 'fedsplit\\[traces\\]', or leave it out"):
        TraceFile("--traces ", tmp_path, name="server", share=1.0)


def test_a_full_file_makes_room_for_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsplit.telemetry.otlp.FILE_BYTES", 1000)
    for number in range(5):
        file = TraceFile("", tmp_path, name="server", share=1.0)
        with span(Telemetry(file), f"span-{number}"):
            pass
        file.close()
    kept = [path.read_text() for path in (file.path.with_suffix(".old.jsonl"), file.path)]
    assert [text.count('"name":"span-') for text in kept] == [2, 1]
    assert "span-3" in kept[0] and "span-4" in kept[1]


def traced(folder, *names):
    """The file of a process that had these spans."""
    file = TraceFile("", folder, name="server", share=1.0)
    for name in names:
        with span(Telemetry(file), name):
            pass
    file.close()
    return file.path


def test_a_process_that_goes_on_with_a_file_leaves_no_empty_and_no_broken_line(tmp_path):
    file = traced(tmp_path, "first")
    traced(tmp_path, "second")
    assert all(map(json.loads, file.read_text().splitlines()))
    with file.open("a") as killed:
        killed.write('{"resourceSpans":[')
    traced(tmp_path, "third")
    *whole, half, last = file.read_text().splitlines()
    assert len(whole) == 2 and half == '{"resourceSpans":['
    assert "third" in last and json.loads(last)


def test_a_file_that_cannot_be_written_is_told_of_once(tmp_path, caplog):
    file = TraceFile("", tmp_path / "traces", name="server", share=1.0)
    (tmp_path / "traces").rmdir()
    for name in ("first", "second"):
        with span(Telemetry(file), name):
            pass
        file._processor.force_flush()
    assert [line.message.partition(": ")[0] for line in caplog.records] == [
        "traces are lost until they can be written again"
    ]
    file.close()


def test_a_step_that_is_not_of_the_share_has_no_trace_inside():
    kept = Spans(wants=False)
    with span(Telemetry(kept), "train_step"):
        kept.wants = True
        with span(Telemetry(kept), "forward") as forward, span(Telemetry(kept), "attempt"):
            assert forward is UNTRACED and sent_ids() == b""
    with span(Telemetry(kept), "open"):
        pass
    assert [each.name for each in kept.ended] == ["open"]


class Failing(Link):
    """Loses the first requests, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def exchange(self, request):
        self.failures -= 1
        if self.failures >= 0:
            raise ConnectionLost("cut")
        return CloseReply()

    def close(self) -> None:
        pass


def test_all_attempts_at_a_request_are_below_it():
    kept, wire = Spans(), WireSpec()
    run = RunSpec(wire=wire, train=TrainSpec())
    link = MeteredLink(Failing(2), Telemetry(kept))
    client = RpcClient(link, run, client="client-0", encoder=DeltaEncoder(wire, {}))
    client.exchange(CloseRequest(session="s1"))
    *attempts, whole = kept.ended
    assert [each.code for each in attempts] == ["CONN_LOST", "CONN_LOST", "OK"]
    assert {each.parent_id for each in attempts} == {whole.span_id}
    assert (whole.name, whole.code, whole.parent_id) == ("close", "OK", b"")
    assert whole.fields == {"client": "client-0", "session": "s1"}
