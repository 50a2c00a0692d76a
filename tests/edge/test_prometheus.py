"""The real Prometheus reads real training and generation, and its alerts reach a webhook."""

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose
from fedsplit.errors import FedsplitError
from fedsplit.serve import Reached, reach
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import Event
from fedsplit.telemetry.metrics import METRICS
from fedsplit.telemetry.prometheus import MetricsServer, Prometheus
from fedsplit.telemetry.round import RoundStats
from fedsplit.telemetry.sinks import Sink, Telemetry
from fedsplit.wire.messages import BackwardRequest, StepRequest
from simulations.bench.certificate import self_signed
from simulations.dashboards import DASHBOARDS, main
from tests.core.worlds import batch
from tests.edge.federation import federate, spec_for
from tests.edge.forked import Program
from tests.edge.monitoring import (
    DEPLOYED,
    Monitor,
    eventually,
    free_address,
    monitoring,
    needs,
    promtool,
)
from tests.edge.scraping import scrape
from tests.edge.tiny_models import make_model

ALERT_S = 10.0
"""The longest time from a fault to the webhook."""
SETTINGS = (
    "clients=1",
    "train=sgd",
    "train.batch_size=2",
    "data.sequence_length=12",
    "wire.up=fp16",
)


class Hold(Sink):
    """Holds a run after its last round, so that its metrics can be read, until it may end."""

    may_end = threading.Event()

    def __init__(self, *, folder: Path) -> None:
        pass

    def on_event(self, event: Event) -> None:
        if isinstance(event, RoundStats) and event.round == event.rounds:
            self.may_end.wait(300)


@dataclass
class Site:
    """A served model, a run, a client, and the Prometheus that reads all three."""

    model: Path
    run: RunSpec
    ca: str
    server: Program
    trunk: str
    metrics: str
    run_metrics: str
    client: Prometheus
    client_metrics: str
    monitor: Monitor
    links: list[Reached] = field(default_factory=list)

    def reach(self, name: str) -> Reached:
        """A client of the served model, whose bytes are counted."""
        reached = reach(
            str(self.model),
            self.trunk,
            run=self.run,
            client=name,
            tls_ca=self.ca,
            telemetry=Telemetry(self.client),
        )
        self.links.append(reached)
        return reached

    def work(self) -> None:
        """Train and generate, and get an error, all of it once more after a while."""
        with self.reach("client-0") as member, self.reach("client-1") as speaker:
            trainer = ClientTrainer(
                member.model, member.trunk, self.run, telemetry=Telemetry(self.client)
            )
            for number in range(2):
                trainer.fit([[batch(2 * number)], [batch(2 * number + 1)]], round=number)
                trainer.evaluate([batch()], round=number)
                ids_BT = batch(rows=1).inputs["input_ids"]
                speaker.model.generate(ids_BT, max_new_tokens=5, do_sample=False)
                with suppress(FedsplitError):
                    lost = dict(session="none", call=0, step=0, num_tokens=1, client_sq_norm=0.0)
                    member.link.exchange(StepRequest(**lost))
                time.sleep(2.5)  # Prometheus reads every second


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("monitored")
    make_model(folder / "model")
    tls = self_signed(folder, "server")
    run_metrics = free_address()
    run = spec_for(
        folder,
        *("clients=2", "train.rounds=2"),
        f"launch.metrics={run_metrics}",
        f"launch.sinks={__name__}.Hold",
    )
    words = ["--model", f"tiny={folder}/model", "--split", "1/2/1", "--bind", "127.0.0.1:0"]
    words += ["--tls-cert", tls.tls_cert, "--tls-key", tls.tls_key, "--metrics", "127.0.0.1:0"]
    words += ["--client-label", "client-0"]
    with ExitStack() as opened:
        server = opened.enter_context(Program("fedsplit", "serve", *words, *SETTINGS))
        trunk = re.search(r"at (127\.0\.0\.1:\d+);", server.stdout.readline())
        metrics = re.search(r"at http://(\S+)/metrics", server.stdout.readline())
        assert trunk and metrics
        client = Prometheus("metrics ")
        served = opened.enter_context(closing(MetricsServer("metrics ", "127.0.0.1:0", client)))
        pool = opened.enter_context(ThreadPoolExecutor(1))
        opened.callback(Hold.may_end.set)
        targets = {
            "fedsplit": [metrics[1], run_metrics],
            "fedsplit-clients": [served.address],
        }
        monitor = opened.enter_context(monitoring(folder, targets))
        training = pool.submit(federate, run)
        eventually(lambda: training.done() or monitor.all_up(), 60.0)
        here = Site(
            model=folder / "model",
            run=compose(SETTINGS),
            ca=tls.tls_cert,
            server=server,
            trunk=trunk[1],
            metrics=metrics[1],
            run_metrics=run_metrics,
            client=client,
            client_metrics=served.address,
            monitor=monitor,
        )
        here.work()
        yield here
        Hold.may_end.set()
        training.result(60)


# --- what needs promtool alone ----------------------------------------------------------------


@needs("promtool")
def test_every_alert_fires_where_it_should_and_only_there() -> None:
    promtool("check", "rules", DEPLOYED / "rules.yml")
    promtool("test", "rules", DEPLOYED / "tests.yml")
    (group,) = yaml.safe_load((DEPLOYED / "rules.yml").read_text())["groups"]
    alerts = {rule["alert"] for rule in group["rules"]}
    cases: Counter[tuple[str, bool]] = Counter()
    for test in yaml.safe_load((DEPLOYED / "tests.yml").read_text())["tests"]:
        for each in test["alert_rule_test"]:
            cases[each["alertname"], bool(each["exp_alerts"])] += 1
    assert len(alerts) >= 8
    assert cases == dict.fromkeys([(a, fires) for a in alerts for fires in (True, False)], 1)


@needs("promtool")
def test_the_configurations_that_are_shipped_are_legal() -> None:
    promtool("check", "config", DEPLOYED / "prometheus.yml")


def test_the_dashboards_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_metric_is_on_a_panel_or_in_an_alert() -> None:
    panels = [panel for panels in DASHBOARDS.values() for panel in panels]
    queries = [query for panel in panels for query in panel.queries.values()]
    used = re.findall(r"fedsplit_\w+", " ".join([*queries, (DEPLOYED / "rules.yml").read_text()]))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} == METRICS.keys()


# --- with the real programs -------------------------------------------------------------------


@pytest.mark.slow
@needs("prometheus", "promtool", "prometheus-alertmanager")
def test_all_metrics_are_as_prometheus_wants_them(site: Site) -> None:
    for address in (site.metrics, site.run_metrics, site.client_metrics):
        promtool("check", "metrics", text=scrape(address))


@pytest.mark.slow
@needs("prometheus", "promtool", "prometheus-alertmanager")
def test_every_panel_shows_finite_numbers(site: Site) -> None:
    empty, odd = [], []
    for name, panels in DASHBOARDS.items():
        for panel in panels:
            if panel.needs_gpu and not torch.cuda.is_available():
                continue
            for query in panel.queries.values():
                found = site.monitor.query(query.replace("$__rate_interval", "5m"))
                if not found:
                    empty.append(f"{name}, {panel.title}: {query}")
                odd += [f"{query}: {each}" for each in found if not math.isfinite(each[1])]
    assert (empty, odd) == ([], [])


@pytest.mark.slow
@needs("prometheus", "promtool", "prometheus-alertmanager")
def test_the_bytes_are_those_that_the_clients_counted(site: Site) -> None:
    up = sum(each.link.bytes_up for each in site.links)
    down = sum(each.link.bytes_down for each in site.links)
    here = f'{{instance="{site.metrics}"}}'
    queries = [f"sum(fedsplit_{name}_bytes_total{here})" for name in ("received", "sent")]
    eventually(lambda: [site.monitor.value(each) for each in queries] == [up, down], 10.0)


@pytest.mark.slow
@needs("prometheus", "promtool", "prometheus-alertmanager")
def test_a_client_with_a_label_is_told_apart(site: Site) -> None:
    used = f'sum by (client) (fedsplit_contributions_total{{instance="{site.metrics}"}}) > 0'
    assert [labels["client"] for labels, _ in site.monitor.query(used)] == ["client-0"]


@pytest.mark.slow
@needs("prometheus", "promtool", "prometheus-alertmanager")
def test_three_faults_reach_a_webhook(site: Site) -> None:
    fired = site.monitor.webhook.fired
    assert not fired - {"FedsplitCertificateExpires"}  # that of the test is for a day
    hung, going_on = threading.Event(), threading.Event()

    def batches() -> Iterator[list[object]]:
        for number in range(4):
            yield [batch(number)]
        hung.set()
        going_on.wait(60)

    with site.reach("client-0") as member, ThreadPoolExecutor(1) as pool:
        trainer = ClientTrainer(member.model, member.trunk, site.run)
        # NaN: the trunk refuses a gradient.
        with member.trunk.session():
            trainer._forward_backward([batch()], 1)
            nan_BTD = torch.full((2, 12, 16), math.nan)
            call = member.trunk.next_call
            member.trunk(torch.zeros(2, 12, 16, requires_grad=True))
            with pytest.raises(FedsplitError, match="grad_trunk_out"):
                member.link.exchange(
                    BackwardRequest(
                        session=member.trunk._named_session(),
                        call=call,
                        want_grad=True,
                        grad_trunk_out_BTD=nan_BTD,
                    )
                )
        eventually(lambda: "FedsplitRefusedNumbers" in fired, ALERT_S)
        # A hang: a client stops in the middle of its steps.
        training = pool.submit(trainer.fit, batches())
        hung.wait(60)
        eventually(lambda: "FedsplitNoStep" in fired, ALERT_S)
        going_on.set()
        training.result(60)
    # A kill: the server is gone.
    assert "FedsplitDown" not in fired
    site.server.kill()
    eventually(lambda: "FedsplitDown" in fired, ALERT_S)
