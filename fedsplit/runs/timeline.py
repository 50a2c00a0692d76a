"""Timelines: the spans of a trace as a picture, and what takes the time over all traces.

Files are those of `launch.traces` and --traces, lines of OTLP JSON, one file a process.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsplit import atomic
from fedsplit.errors import ConfigError

_MS = 1e6
SKEW_MS = 1.0
"""How much earlier than its sender a span of another process may begin without a remark."""
_LABEL_SHARE = 0.05
"""The share of the picture's width from which on a bar has its name inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSpan:
    """A span as a file has it; times are nanoseconds since 1970, and ids are hexadecimal."""

    process: str
    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    code: str
    fields: Mapping[str, str]

    @property
    def ms(self) -> float:
        """Its length in milliseconds."""
        return (self.ended - self.began) / _MS


class Traces:
    """The traces of some files.

    Args:
        paths: Files, and folders of which all files *.jsonl are read.

    Raises:
        ConfigError: A file cannot be read, or none has a span.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        # By the id of the span too: a file may be given twice, by its name and by its folder.
        found: defaultdict[str, dict[str, RecordedSpan]] = defaultdict(dict)
        given = list(paths)
        for path in given:
            for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
                for span in _spans_of(file):
                    found[span.trace][span.id] = span
        self._by_id = {trace: list(spans.values()) for trace, spans in found.items()}
        if not self._by_id:
            raise ConfigError(
                f"no span in {', '.join(map(str, given))}; trace a run with launch.traces=DIR, and "
                "with launch.trace_share=1 all its steps"
            )

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[list[RecordedSpan]]:
        return iter(self._by_id.values())

    def of(self, trace: str = "") -> list[RecordedSpan]:
        """Return the spans of the trace whose id begins so; by default those of the longest step.

        Raises:
            ConfigError: No trace, or more than one, has such an id.
        """
        if not trace:
            first = [span for spans in self._by_id.values() for span in spans if not span.parent]
            steps = [span for span in first if span.name == "train_step"] or first
            # Of a trace whose client is not among the files, no span is the first one.
            longest = max(steps or [spans[0] for spans in self._by_id.values()], key=_length)
            return self._by_id[longest.trace]
        found = [each for each in self._by_id if each.startswith(trace)]
        if len(found) != 1:
            raise ConfigError(f"--trace={trace} is the begin of {len(found)} traces in these files")
        return self._by_id[found[0]]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A heading, and a row for each kind of span: how often, and how long."""
        kinds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for spans in self._by_id.values():
            for span in spans:
                side = "server" if span.process == "server" else "clients"
                kinds[side, span.name].append(span.ms)
        rows = [
            (side, name, f"{len(ms):,}", f"{median(ms):.1f}", f"{max(ms):.1f}", f"{sum(ms):,.0f}")
            for (side, name), ms in sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
        ]
        return [("where", "span", "number", "median ms", "longest ms", "sum ms"), *rows]


def skew_ms(spans: Sequence[RecordedSpan]) -> float:
    """Return by how much the clock of the trace's server is at least behind that of its client."""
    by_id = {span.id: span for span in spans}
    return max(
        (
            (by_id[span.parent].began - span.began) / _MS
            for span in spans
            if span.parent in by_id and by_id[span.parent].process != span.process
        ),
        default=0.0,
    )


def draw(spans: Sequence[RecordedSpan], file: Path) -> str:
    """Draw the spans of a trace; return a sentence about it.

    Args:
        spans: Those of one trace.
        file: The picture; its ending is the format.

    Raises:
        ConfigError: There is no such format.
    """
    began, ended = min(span.began for span in spans), max(span.ended for span in spans)
    places = _places(spans)
    lanes = sorted(set(places.values()), key=lambda lane: (lane[0] == "server", *lane))
    figure = Figure(figsize=(12, 1.2 + 0.34 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(span.name for span in spans))
    colors = {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}
    for span in spans:
        left, width = (span.began - began) / _MS, span.ms
        place, failed = lanes.index(places[span.id]), span.code != "OK"
        axes.barh(place, width, left=left, color=colors[span.name], height=0.8)
        if failed:
            axes.barh(place, width, left=left, fill=False, edgecolor="red", hatch="//", height=0.8)
        if failed or width * _MS > _LABEL_SHARE * (ended - began):
            text = f"{span.name} {span.code if failed else ''}"
            axes.text(left, place, f" {text}", va="center", fontsize=7, clip_on=True)
    title = _title(spans, (ended - began) / _MS)
    _style(axes, lanes, colors, title)
    try:
        with atomic.new_file(file) as unfinished:
            figure.savefig(unfinished, dpi=120, format=file.suffix.removeprefix(".") or "png")
    except ValueError as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    return title


def _style(
    axes: Axes, lanes: Sequence[tuple[str, int]], colors: Mapping[str, Any], title: str
) -> None:
    # A process is named at its first lane.
    names = [process if depth == 0 else "" for process, depth in lanes]
    axes.set_yticks(range(len(lanes)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=9, loc="left")
    for name, color in colors.items():
        axes.barh(0, 0, color=color, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)


def _title(spans: Sequence[RecordedSpan], ms: float) -> str:
    first = min(spans, key=lambda span: span.began)
    fields = " ".join(f"{name}={first.fields[name]}" for name in sorted(first.fields))
    return f"trace {first.trace}: {first.name} of {ms:.1f} ms, {fields}"


def _places(spans: Sequence[RecordedSpan]) -> dict[str, tuple[str, int]]:
    """Return the lane of each span: its process, and how many spans of it are around this one.

    Micro-batches overlap, so a span that has no room in its lane goes to one below.
    """
    by_id = {span.id: span for span in spans}
    places: dict[str, tuple[str, int]] = {}
    ends: defaultdict[tuple[str, int], int] = defaultdict(int)
    for span in sorted(spans, key=lambda span: (span.began, -span.ended)):
        above = by_id.get(span.parent)
        is_below = above is not None and above.process == span.process and above.id in places
        lane = span.process, places[span.parent][1] + 1 if is_below else 0
        while ends[lane] > span.began:
            lane = lane[0], lane[1] + 1
        ends[lane] = span.ended
        places[span.id] = lane
    return places


def _length(span: RecordedSpan) -> int:
    return span.ended - span.began


def _spans_of(file: Path) -> Iterable[RecordedSpan]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        try:
            described = json.loads(line)
        except ValueError:  # half a line of a process that was killed
            continue
        try:
            for resource in described["resourceSpans"]:
                process = _fields(resource["resource"])["service.instance.id"]
                for scope in resource["scopeSpans"]:
                    yield from (_recorded(process, span) for span in scope["spans"])
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(f"{file}, line {number}: no spans of fedsplit ({exc!r})") from exc


def _recorded(process: str, span: Mapping[str, Any]) -> RecordedSpan:
    fields = _fields(span)
    return RecordedSpan(
        process=process,
        name=span["name"],
        trace=span["traceId"],
        id=span["spanId"],
        parent=span.get("parentSpanId", ""),
        began=int(span["startTimeUnixNano"]),
        ended=int(span["endTimeUnixNano"]),
        code=fields.pop("error.type", "OK"),
        fields={name.removeprefix("fedsplit."): value for name, value in fields.items()},
    )


def _fields(described: Mapping[str, Any]) -> dict[str, str]:
    found = described.get("attributes", [])
    return {each["key"]: str(next(iter(each["value"].values()), "")) for each in found}
