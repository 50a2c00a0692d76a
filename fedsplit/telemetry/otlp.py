"""Traces as files: a sink that writes spans as lines of OTLP JSON, which collectors read.

The exporter of OpenTelemetry is an extra, so the functions that need it import it.
"""

import logging
import os
from pathlib import Path
from typing import Any

from fedsplit import atomic
from fedsplit.errors import ConfigError, StorageError
from fedsplit.telemetry.events import Event, SpanEnded
from fedsplit.telemetry.sinks import Sink

FILE_BYTES = 100 << 20
"""The most bytes of a file, after which it makes room for a new one."""

_ID_RANGE = 1 << 64

log = logging.getLogger(__name__)


class TraceFile(Sink):
    """Writes spans to `folder`/`name`-PID.jsonl, in a thread of its own.

    A full file is renamed to end in .old.jsonl, in place of the one before it, so that both have at
    most twice `FILE_BYTES`.

    Args:
        what: The setting that asks for traces, for errors: "--traces ".
        folder: The folder of the file, which is made if need be.
        name: Whose spans these are, such as server or client-0.
        share: The share of the traces that are written, from 0 to 1. Processes with the same share
            write the same ones.

    Raises:
        ConfigError: The exporter is not installed, or the folder cannot be written.
    """

    takes_traces = True

    def __init__(self, what: str, folder: Path, *, name: str, share: float) -> None:
        try:
            from opentelemetry.exporter.otlp.json.file.trace_exporter import FileSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as exc:
            raise ConfigError(
                f"{what}{folder} asks for traces, but opentelemetry-exporter-otlp-json-file is not "
                "installed here: pip install 'fedsplit[traces]', or leave it out"
            ) from exc
        self.path = folder / f"{name}-{os.getpid()}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"no permission to write in {folder}")
        except OSError as exc:
            raise ConfigError(f"{what}{folder} cannot be written: {exc}") from exc
        # Resource.create would also look for cloud machines and read the environment.
        self._resource = Resource({"service.name": "fedsplit", "service.instance.id": name})
        self._wanted = round(share * _ID_RANGE)
        stream: Any = _BoundedFile(self.path)
        self._processor: Any = BatchSpanProcessor(FileSpanExporter(stream=stream))

    def wants_trace(self, trace_id: bytes) -> bool:
        """Return whether a trace is of the share, which its id decides."""
        return int.from_bytes(trace_id[8:]) < self._wanted

    def on_event(self, event: Event) -> None:
        """Write a span of a trace that is wanted."""
        if isinstance(event, SpanEnded) and self.wants_trace(event.trace_id):
            self._processor.on_end(_span_of(event, self._resource))

    def close(self) -> None:
        """Write what is left."""
        self._processor.shutdown()


class _BoundedFile:
    """The file to which the processor's thread adds lines; it is there once it has one."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_lost = False

    def write(self, lines: str) -> None:
        """Add lines; before that, rename a file that has no room for them."""
        try:
            self._add(lines)
        except (OSError, StorageError) as exc:
            # Once: on a full disk, every batch of the next hours is lost.
            if not self._is_lost:
                log.warning("traces are lost until they can be written again: %s", exc)
            self._is_lost = True
        else:
            self._is_lost = False

    def _add(self, lines: str) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and size + len(lines) > FILE_BYTES:
            self._path.replace(self._path.with_suffix(".old.jsonl"))
        elif size and not _ends_a_line(self._path):
            # Another process with this number was killed in the middle of a line.
            lines = f"\n{lines}"
        atomic.append_line(self._path, lines.removesuffix("\n"))

    def flush(self) -> None:
        """Do nothing; each write is complete."""


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _span_of(event: SpanEnded, resource: Any) -> Any:
    """Return the span as OpenTelemetry has it."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(span_id: bytes) -> SpanContext:
        return SpanContext(
            int.from_bytes(event.trace_id),
            int.from_bytes(span_id),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )

    # A client chooses the number of a call, and files have integers of 64 bits with a sign.
    attributes = {
        f"fedsplit.{name}": str(value) if isinstance(value, int) and value >> 63 else value
        for name, value in event.fields.items()
    }
    failed = event.code != "OK"
    if failed:
        attributes["error.type"] = event.code
    return ReadableSpan(
        event.name,
        context=context(event.span_id),
        parent=context(event.parent_id) if event.parent_id else None,
        resource=resource,
        attributes=attributes,  # type: ignore[arg-type]  # texts and numbers
        status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
        start_time=event.began_ns,
        end_time=event.ended_ns,
    )
