"""Reads metrics as Prometheus does, also from inside of a run."""

import json
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fedsplit.telemetry.events import Event
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by the name of a metric, and its labels in their order."""


def scrape(address: str) -> str:
    """The text at an address."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


def samples_of(text: str) -> Samples:
    """The values of a text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric over all labels but these."""
    return sum(
        value
        for (found, have), value in samples.items()
        if found == name and labels.items() <= dict(have).items()
    )


class Scraper(Sink):
    """A sink that reads the metrics of its own run after every round, into `scraped.json`."""

    address = ""

    def __init__(self, *, folder: Path) -> None:
        self._file = folder / "scraped.json"
        self._texts: list[str] = []

    def on_event(self, event: Event) -> None:
        """Read after a round."""
        if isinstance(event, RoundStats):
            self._texts.append(scrape(self.address))

    def close(self) -> None:
        """Write what was read."""
        self._file.write_text(json.dumps(self._texts), encoding="utf-8")
