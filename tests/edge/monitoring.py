"""Real programs of Prometheus, and a webhook that receives the alerts of a real Alertmanager."""

import json
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house.source import ROOT

DEPLOYED = ROOT / "deploy" / "prometheus"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing, and say how to get it."""
    missing = [each for each in programs if shutil.which(each) is None]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"no {', '.join(missing)}: apt-get install prometheus prometheus-alertmanager",
    )


def free_address() -> str:
    """An address of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def eventually(condition: Callable[[], Any], seconds: float) -> Any:
    """The result of a condition as soon as it is true; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.05)
    return found


def promtool(*words: object, text: str | None = None) -> None:
    """Run promtool, which must find nothing wrong and say nothing that is."""
    done = subprocess.run(
        ["promtool", *map(str, words)], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


class Webhook:
    """A server that receives alerts; `fired` are the names of those that are firing."""

    def __init__(self) -> None:
        fired: set[str] = set()
        self.fired = fired

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                alerts = body["alerts"]
                fired.update(a["labels"]["alertname"] for a in alerts if a["status"] == "firing")
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/alerts"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """Stop receiving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass(frozen=True)
class Monitor:
    """A Prometheus at work, and the webhook of its alerts."""

    address: str
    webhook: Webhook

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """The labels and values of an expression now."""
        words = urllib.parse.urlencode({"query": expression})
        found = self._get(f"query?{words}")["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def value(self, expression: str) -> float:
        """The one value of an expression now; NaN if it has none."""
        found = self.query(expression)
        return found[0][1] if found else math.nan

    def all_up(self) -> bool:
        """Whether all targets were read."""
        return {each["health"] for each in self._get("targets")["activeTargets"]} == {"up"}

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}", timeout=10) as reply:
            return json.loads(reply.read())["data"]


@contextmanager
def monitoring(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Monitor]:
    """Prometheus and Alertmanager with the rules of `deploy/`, which read targets every second."""
    webhook, address, alerts = Webhook(), free_address(), free_address()
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOYED / "rules.yml")]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alerts]
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = list(targets.get(job["job_name"], ()))
    routes = yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text())
    routes["receivers"][0]["webhook_configs"][0]["url"] = webhook.url
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))
    programs = (
        (
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}",
        ),
        (
            "prometheus-alertmanager",
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alerts",
            f"--web.listen-address={alerts}",
            "--cluster.listen-address=",
        ),
    )
    with ExitStack() as opened:
        opened.callback(webhook.close)
        log = opened.enter_context((folder / "monitoring.log").open("w"))
        for words in programs:
            program = subprocess.Popen(words, stdout=log, stderr=log)
            opened.callback(program.wait)
            opened.callback(program.kill)
        monitor = Monitor(address, webhook)
        eventually(lambda: _answers(address) and _answers(alerts), 30.0)
        yield monitor


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=1) as reply:
            return int(reply.status) == 200
    except OSError:
        return False
