"""Writes the Grafana dashboards of `deploy/grafana/` from a table of panels, or checks them."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"

_PER_ROW, _WIDTH, _HEIGHT = 3, 8, 8
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A panel: its title, the unit that Grafana shows, and its queries by their legend."""

    title: str
    unit: str
    queries: Mapping[str, str]

    @property
    def needs_gpu(self) -> bool:
        """Whether it is empty on a machine without a GPU."""
        return any("fedsplit_gpu" in query for query in self.queries.values())


def _panel(title: str, unit: str, **queries: str) -> Panel:
    named = {legend.replace("_", " "): query for legend, query in queries.items()}
    return Panel(title=title, unit=unit, queries=named)


def _rate(metric: str, by: str = "", having: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(fedsplit_{metric}{having}[$__rate_interval]))"


def _quantile(number: float, metric: str, by: str = "", having: str = "") -> str:
    # The comparison leaves out what did not happen, which would be NaN.
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({number}, {_rate(f'{metric}_bucket', grouped, having)}) >= 0"


def _share(metric: str, part: str, whole: str = "") -> str:
    return f"{_rate(metric, having=part)} / {_rate(metric, having=whole)} >= 0"


def _times(title: str, metric: str, having: str = "") -> Panel:
    quantiles = {f"p{share}": _quantile(share / 100, metric, having=having) for share in (50, 99)}
    return _panel(title, "s", **quantiles)


def _times_by(title: str, metric: str, by: str) -> Panel:
    return _panel(title, "s", **{f"p99 {{{{{by}}}}}": _quantile(0.99, metric, by)})


_GENERATE = '{kind="generate"}'
_HITS = "cache_lookups_total"

FLEET = (
    _panel("Up", "bool_yes_no", **{"{{job}} {{instance}}": 'up{job=~"fedsplit.*"}'}),
    _panel("Versions", "short", **{"{{instance}} {{version}}": "fedsplit_build_info"}),
    _panel("Trunks that serve", "short", **{"{{trunk}}": "fedsplit_trunk_running"}),
    _panel("Open sessions", "short", **{"{{trunk}}": "fedsplit_sessions"}),
    _panel("Requests", "reqps", **{"{{kind}}": _rate("requests_total", "kind")}),
    _panel("Errors", "reqps", **{"{{code}}": _rate("requests_total", "code", '{code!="OK"}')}),
    _times_by("Time of requests", "request_duration_seconds", "kind"),
    _times_by("Wait for the trunk", "queue_duration_seconds", "kind"),
    _times_by("Time of passes", "compute_duration_seconds", "kind"),
    _panel("Received", "Bps", **{"{{kind}}": _rate("received_bytes_total", "kind")}),
    _panel("Sent", "Bps", **{"{{kind}}": _rate("sent_bytes_total", "kind")}),
    _panel(
        "Bytes by codec",
        "Bps",
        **{
            "up {{codec}}": _rate("received_bytes_total", "codec"),
            "down {{codec}}": _rate("sent_bytes_total", "codec"),
        },
    ),
    _panel("Calls at the barrier", "short", **{"{{trunk}}": "fedsplit_waiting_calls"}),
    _panel(
        "Caches in use",
        "percentunit",
        **{"{{trunk}} {{cache}}": "fedsplit_cache_bytes / fedsplit_cache_limit_bytes"},
    ),
    _panel("Evictions", "ops", **{"{{cache}}": _rate("evictions_total", "cache")}),
    _panel("Attempts that failed", "ops", **{"{{code}}": _rate("client_retries_total", "code")}),
    _panel(
        "Days of the certificate",
        "d",
        **{"{{instance}}": "(fedsplit_certificate_expiry_timestamp_seconds - time()) / 86400"},
    ),
    _panel(
        "GPU memory",
        "bytes",
        **{
            "used {{device}}": "fedsplit_gpu_memory_used_bytes",
            "all {{device}}": "fedsplit_gpu_memory_limit_bytes",
        },
    ),
    _panel("GPU utilization", "percentunit", **{"{{device}}": "fedsplit_gpu_utilization_ratio"}),
)

TRAINING = (
    _panel("Round", "short", round="fedsplit_round", of="fedsplit_rounds_planned"),
    _panel(
        "Loss", "short", training="fedsplit_train_loss_nats", held_out="fedsplit_eval_loss_nats"
    ),
    _panel("Time of a round", "s", round="fedsplit_round_duration_seconds"),
    _panel("Clients of the round", "short", **{"{{outcome}}": "fedsplit_round_clients"}),
    _panel("Clients at work", "short", **{"{{trunk}}": "fedsplit_training_clients"}),
    _panel("Steps", "ops", steps=_rate("steps_total")),
    _panel("Parameter version", "short", **{"{{trunk}}": "fedsplit_parameter_version"}),
    _panel("Learning rate", "short", rate="fedsplit_learning_rate"),
    _panel("Gradient norm", "short", norm="fedsplit_gradient_norm"),
    _panel("Contributions", "ops", **{"{{outcome}}": _rate("contributions_total", "outcome")}),
    _panel(
        "Late and stale share",
        "percentunit",
        share=_share("contributions_total", '{outcome=~"late|stale"}'),
    ),
    _panel("Staleness", "short", p99=_quantile(0.99, "contribution_staleness_steps")),
    _times("Wait for the others", "barrier_wait_seconds"),
    _panel(
        "Time since the last step",
        "s",
        now="fedsplit_step_idle_seconds",
        usually="fedsplit_step_interval_seconds",
    ),
    _panel(
        "The guard",
        "ops",
        clipped=_rate("clipped_gradients_total"),
        refused=_rate("refused_gradients_total"),
        quarantines=_rate("quarantines_total"),
    ),
    _panel("Tokens", "ops", **{"{{kind}}": _rate("tokens_total", "kind")}),
    _panel(
        "Graphs that were found",
        "percentunit",
        hits=_share(_HITS, '{cache="stash", result="hit"}', '{cache="stash"}'),
    ),
    _times("Step of a client", "client_step_duration_seconds"),
    _panel("Samples of clients", "ops", samples=_rate("client_samples_total")),
    _panel("Tokens of clients", "ops", tokens=_rate("client_tokens_total")),
    _panel("Epsilon", "short", **{"{{unit}}": "fedsplit_privacy_epsilon"}),
    _panel("Privacy budget", "percentunit", spent="fedsplit_privacy_budget_spent_ratio"),
)

GENERATION = (
    _panel("Tokens", "ops", tokens=_rate("tokens_total", having=_GENERATE)),
    _panel("Requests", "reqps", requests=_rate("requests_total", having=_GENERATE)),
    _panel(
        "Sessions in a pass",
        "short",
        mean=f"{_rate('pass_sessions_sum', having=_GENERATE)} / "
        f"{_rate('pass_sessions_count', having=_GENERATE)} >= 0",
        p99=_quantile(0.99, "pass_sessions", having=_GENERATE),
    ),
    _times("Time to the first token", "client_time_to_first_token_seconds"),
    _times("Time between tokens", "client_time_between_tokens_seconds"),
    _times("Time of a pass", "compute_duration_seconds", _GENERATE),
    _times("Wait for a pass", "queue_duration_seconds", _GENERATE),
    _panel("Keys and values", "bytes", **{"{{trunk}}": 'fedsplit_cache_bytes{cache="kv"}'}),
    _panel(
        "Caches that were found",
        "percentunit",
        hits=_share(_HITS, '{cache="kv", result="hit"}', '{cache="kv"}'),
    ),
    _panel("Caches that were dropped", "ops", kv=_rate("evictions_total", having='{cache="kv"}')),
)

DASHBOARDS: Mapping[str, Sequence[Panel]] = {
    "Fleet": FLEET,
    "Training": TRAINING,
    "Generation": GENERATION,
}
"""The panels of each dashboard."""


def files() -> Iterator[tuple[Path, str]]:
    """Yield the file of each dashboard, and the text that it must have."""
    for name, panels in DASHBOARDS.items():
        text = json.dumps(_dashboard(name, panels), indent=1)
        yield FOLDER / f"{name.lower()}.json", f"{text}\n"


def _dashboard(name: str, panels: Sequence[Panel]) -> dict[str, Any]:
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"}
    return {
        "uid": f"fedsplit-{name.lower()}",
        "title": f"fedsplit: {name}",
        "tags": ["fedsplit"],
        "schemaVersion": 38,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [_panel_at(place, panel) for place, panel in enumerate(panels)],
    }


def _panel_at(place: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(place, _PER_ROW)
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend}
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboards; with --check, return 1 if a file differs from the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if it would")
    checks = parser.parse_args(arguments).check
    differing = [
        (path, text)
        for path, text in files()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in differing:
        print(f"{path} {'is not up to date' if checks else 'is written'}")
        if not checks:
            path.write_text(text, encoding="utf-8")
    if checks and differing:
        print("run: python -m simulations.dashboards", file=sys.stderr)
    return int(checks and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
