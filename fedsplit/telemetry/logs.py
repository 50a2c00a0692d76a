"""The log: the one tree of loggers below `fedsplit`, as text or as JSON, and the sinks of it."""

import logging
import sys
from typing import Any, TextIO

from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.telemetry.context import current_fields
from fedsplit.telemetry.events import Event, SpanEnded
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink
from fedsplit.telemetry.spans import current

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

TREE = logging.getLogger("fedsplit")
"""The logger above all others of fedsplit."""

_PLAIN = "%(levelname)s: %(message)s"


def configure(form: str, level: str, handler: logging.Handler | None = None) -> None:
    """Write the log to stderr, unless this process has said before where its log goes.

    Args:
        form: One of `FORMATS`.
        level: One of `LEVELS`.
        handler: Takes the lines in the format text, in place of a handler for stderr.

    Raises:
        ConfigError: There is no such format or level.
    """
    for option, value, known in (("format", form, FORMATS), ("level", level, LEVELS)):
        if value not in known:
            raise ConfigError(
                f"--log-{option} {value} (or FEDSPLIT_LOG_{option.upper()} of the environment) is "
                f"unknown; use one of: {', '.join(known)}"
            )
    if TREE.handlers:
        return
    if form == "json":
        handler = json_handler()
        TREE.propagate = False
        # What other libraries log, and Python's warnings, would be text between the lines.
        if not (root := logging.getLogger()).handlers:
            root.addHandler(handler)
        logging.captureWarnings(True)
    elif logging.getLogger().handlers:
        # Those of a program that uses fedsplit as a library.
        return
    elif handler is None:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter(_PLAIN))
    TREE.setLevel(level.upper())
    TREE.addHandler(handler)


def json_handler(level: int = logging.DEBUG) -> logging.Handler:
    """Return a handler that writes lines of JSON, with the fields of the Elastic Common Schema.

    Args:
        level: The level below which it writes none.
    """
    from ecs_logging import StdlibFormatter

    class Lines(StdlibFormatter):
        def format_to_ecs(self, record: logging.LogRecord) -> dict[str, Any]:
            fields = super().format_to_ecs(record)
            if record.exc_info and record.exc_info[0]:
                # Its own leaves out the errors that this one was raised from.
                fields["error"]["stack_trace"] = self.formatException(record.exc_info)
            return fields

    handler = _Stderr()
    # The origin of a line in the source is of no use in operation, and `original` is the message.
    handler.setFormatter(Lines(exclude_fields=["log.original", "log.origin"]))
    handler.addFilter(_with_fields)
    handler.setLevel(level)
    return handler


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at the time: Flower replaces it in its processes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute of the base
        return sys.stderr


def _with_fields(record: logging.LogRecord) -> bool:
    """Add the fields of the thread to a line, and the code of an error that it tells of."""
    for name, value in current_fields().items():
        record.__dict__.setdefault(f"fedsplit.{name}", value)
    told = record.args if isinstance(record.args, tuple) else ()
    for cause in (*told, (record.exc_info or (None, None))[1]):
        if isinstance(cause, FedsplitError):
            record.__dict__["error.code"] = cause.code
    if trace_id := current().context.trace_id:
        record.__dict__.setdefault("trace.id", trace_id.hex())
    record.__dict__.setdefault("service.name", "fedsplit")
    return True


class RoundLog(Sink):
    """Logs the printed line of every round.

    Args:
        log: The logger.
    """

    needs_details = False

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def on_event(self, event: Event) -> None:
        """Log a round."""
        if isinstance(event, RoundStats):
            self._log.info("%s", event.line)


class SpanLog(Sink):
    """Logs every span at DEBUG, so that a step can be followed by the id of its trace."""

    takes_traces = True

    def wants_trace(self, trace_id: bytes) -> bool:
        """Return True."""
        return True

    def on_event(self, event: Event) -> None:
        """Log a span."""
        if isinstance(event, SpanEnded):
            took_ms = (event.ended_ns - event.began_ns) / 1e6
            fields = {f"fedsplit.{name}": value for name, value in event.fields.items()}
            fields |= {"trace.id": event.trace_id.hex(), "span.id": event.span_id.hex()}
            fields |= {"parent.id": event.parent_id.hex()} if event.parent_id else {}
            fields |= {"event.duration": event.ended_ns - event.began_ns}
            fields |= {"error.code": event.code} if event.code != "OK" else {}
            _SPANS.debug("%s took %.1f ms: %s", event.name, took_ms, event.code, extra=fields)


_SPANS = logging.getLogger(__name__)


def span_sinks() -> list[Sink]:
    """Return the sinks that log spans: one at the level debug, else none."""
    return [SpanLog()] if _SPANS.isEnabledFor(logging.DEBUG) else []
