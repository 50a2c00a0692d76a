"""The log: the one tree of loggers below `fedsplit`, as text or as JSON, and the sinks of it.

FEDSPLIT_LOG_FORMAT and FEDSPLIT_LOG_LEVEL choose the format and the level in every process.
"""

import logging
import os
import sys
from collections.abc import Iterable
from typing import TextIO

from fedsplit.errors import ConfigError
from fedsplit.telemetry.context import current_fields
from fedsplit.telemetry.events import Event, SpanEnded
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink
from fedsplit.telemetry.spans import current

FORMAT_VARIABLE, LEVEL_VARIABLE = "FEDSPLIT_LOG_FORMAT", "FEDSPLIT_LOG_LEVEL"

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

TREE = logging.getLogger("fedsplit")
"""The logger above all others of fedsplit."""

_PLAIN = "%(levelname)s: %(message)s"
_ECS_NAMES = {"code": "error.code"}
"""The fields that the Elastic Common Schema has a name for; others are below `fedsplit`."""


def configure(level: str, handler: logging.Handler | None = None) -> None:
    """Write the log to stderr, unless this process has said before where its log goes.

    Args:
        level: The level, if the environment names none.
        handler: Takes the lines in the format text, in place of a handler for stderr.

    Raises:
        ConfigError: The environment names an unknown format or level.
    """
    if TREE.handlers:
        return
    form, level = _chosen(FORMAT_VARIABLE, FORMATS, "text"), _chosen(LEVEL_VARIABLE, LEVELS, level)
    if form == "json":
        handler = json_handler()
        TREE.propagate = False
    elif logging.getLogger().handlers:
        # Those of a program that uses fedsplit as a library.
        return
    elif handler is None:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter(_PLAIN))
    TREE.setLevel(level.upper())
    TREE.addHandler(handler)


def choose(*, form: str = "", level: str = "") -> None:
    """Choose the format and the level, for this process and those that it starts; "" keeps one."""
    # Through the environment, which Flower's processes pass on.
    for variable, value in ((FORMAT_VARIABLE, form), (LEVEL_VARIABLE, level)):
        if value:
            os.environ[variable] = value


def without_options(arguments: Iterable[str]) -> list[str]:
    """Choose as the options --log-format and --log-level say, and return the other arguments.

    Raises:
        ConfigError: An option has no value.
    """
    found: dict[str, str] = {}
    others, rest = [], iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in ("--log-format", "--log-level"):
            others.append(argument)
            continue
        found[option] = value if equals else next(rest, "")
        if not found[option]:
            raise ConfigError(f"{option} needs a value")
    choose(form=found.get("--log-format", ""), level=found.get("--log-level", ""))
    return others


def is_json() -> bool:
    """Return whether the environment asks for JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def json_handler(level: int = logging.DEBUG) -> logging.Handler:
    """Return a handler that writes lines of JSON, with the fields of the Elastic Common Schema.

    Args:
        level: The level below which it writes none.
    """
    from ecs_logging import StdlibFormatter

    handler = _Stderr()
    # The origin of a line in the source is of no use in operation, and `original` is the message.
    handler.setFormatter(StdlibFormatter(exclude_fields=["log.original", "log.origin"]))
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
    """Add the fields of the thread to a line; those of the line itself take precedence."""
    for name, value in current_fields().items():
        record.__dict__.setdefault(f"fedsplit.{name}", value)
    for name, known in _ECS_NAMES.items():
        if name in record.__dict__:
            record.__dict__[known] = record.__dict__.pop(name)
    if trace_id := current().context.trace_id:
        record.__dict__.setdefault("trace.id", trace_id.hex())
    record.__dict__.setdefault("service.name", "fedsplit")
    return True


def _chosen(variable: str, known: Iterable[str], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in known:
        option = variable.removeprefix("FEDSPLIT").lower().replace("_", "-")
        raise ConfigError(
            f"-{option} {value} (or {variable} of the environment) is unknown; use one of: "
            f"{', '.join(known)}"
        )
    return value


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
