"""Metrics of servers, runs and clients: what they count, and what is refused."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client import generate_latest

from fedsplit.cli import main
from fedsplit.client.trainer import ClientTrainer
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.serve import Served, hosted, reach
from fedsplit.spec import LaunchSpec, RunSpec, WireSpec
from fedsplit.telemetry.events import Contributed, RequestRetried
from fedsplit.telemetry.metrics import METRICS
from fedsplit.telemetry.outlets import Outlets
from fedsplit.telemetry.prometheus import MetricsServer, Prometheus
from fedsplit.telemetry.sinks import Telemetry
from fedsplit.telemetry.tensorboard import TensorBoard
from fedsplit.wire.messages import CloseRequest
from simulations.bench.certificate import self_signed
from tests.core.worlds import batch, small_run, wait_until
from tests.edge.federation import federate, spec_for
from tests.edge.monitoring import free_address
from tests.edge.scraping import Samples, Scraper, samples_of, scrape, total
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, RunSpec, str, MetricsServer]]:
    """A served model that trains and generates, with metrics."""
    model = tmp_path / "model"
    make_model(model)
    run = small_run(clients=1, wire=WireSpec(up="fp16"))
    sink = Prometheus("--metrics ")
    metrics = MetricsServer("--metrics ", "127.0.0.1:0", sink)
    wire = replace(run.wire, bind="127.0.0.1:0")
    served = [Served(name="tiny", model=str(model))]
    with hosted(served, run, wire, telemetry=Telemetry(sink)) as address:
        yield model, run, address, metrics
    metrics.close()


def test_a_server_counts_every_byte_that_its_clients_saw(server) -> None:
    model, run, address, metrics = server
    with reach(str(model), address, run=run, client="client-0") as trained:
        ClientTrainer(trained.model, trained.trunk, run).fit([[batch()], [batch(1)]])
    with reach(str(model), address) as spoken:
        spoken.model.generate(batch(rows=1).inputs["input_ids"], max_new_tokens=5, do_sample=False)
    up = trained.link.bytes_up + spoken.link.bytes_up
    down = trained.link.bytes_down + spoken.link.bytes_down
    # A server counts a reply after it was taken.
    wait_until(lambda: total(read(metrics), "fedsplit_sent_bytes_total") == down)
    found = read(metrics)
    assert total(found, "fedsplit_received_bytes_total") == up
    assert total(found, "fedsplit_received_bytes_total", kind="forward", codec="fp16") > 0
    assert total(found, "fedsplit_received_bytes_total", kind="forward", codec="none") == 0
    for kind, count in {"forward": 2, "backward": 2, "step": 2, "generate": 5, "open": 2}.items():
        assert total(found, "fedsplit_requests_total", kind=kind, code="OK") == count
        assert total(found, "fedsplit_request_duration_seconds_count", kind=kind) == count
    assert total(found, "fedsplit_steps_total") == 2
    assert total(found, "fedsplit_contributions_total", outcome="used") == 2
    assert total(found, "fedsplit_parameter_version", trunk="tiny") == 2
    assert total(found, "fedsplit_tokens_total", kind="generate") == 12 + 4


def read(metrics: MetricsServer) -> Samples:
    return samples_of(scrape(metrics.address))


def test_a_server_counts_what_it_refuses_at_its_door(server) -> None:
    model, run, address, metrics = server
    with (
        reach(str(model), address, run=run, client="client-0") as member,
        pytest.raises(FedsplitError),
    ):
        member.trunk.exchange(CloseRequest(session="no such session"))
    assert total(read(metrics), "fedsplit_requests_total", kind="close", code="SESSION_LOST") == 1


def test_a_run_has_metrics_of_its_server_and_of_its_clients(tmp_path: Path) -> None:
    Scraper.address = free_address()
    run = spec_for(
        tmp_path,
        "clients=2",
        "train.rounds=2",
        f"launch.metrics={Scraper.address}",
        "launch.sinks=tests.edge.scraping.Scraper",
    )
    folder = federate(run)
    texts = json.loads((folder.path / "scraped.json").read_text("utf-8"))
    rounds, (first, last) = folder.rounds(), map(samples_of, texts)
    assert [total(each, "fedsplit_round") for each in (first, last)] == [1, 2]
    assert total(last, "fedsplit_steps_total") == rounds[-1].version == 2
    assert total(last, "fedsplit_train_loss_nats") == rounds[-1].loss
    assert total(last, "fedsplit_client_step_duration_seconds_count") == 4
    assert total(last, "fedsplit_client_tokens_total") == sum(each.tokens for each in rounds)
    assert total(last, "fedsplit_received_bytes_total") == sum(each.bytes_up for each in rounds)
    assert total(last, "fedsplit_privacy_epsilon") == 0.0
    assert not {name for name, _ in last if name.startswith("fedsplit_gpu")}
    # No client is named in them.
    assert "client-0" not in texts[-1]
    with pytest.raises(OSError, match="refused"):
        scrape(Scraper.address)


def test_a_run_tells_its_clients_apart_where_that_is_asked_for(tmp_path: Path) -> None:
    Scraper.address = free_address()
    run = spec_for(
        tmp_path,
        "clients=2",
        f"launch.metrics={Scraper.address}",
        "launch.client_labels=true",
        "launch.sinks=tests.edge.scraping.Scraper",
    )
    folder = federate(run)
    (text,) = json.loads((folder.path / "scraped.json").read_text("utf-8"))
    found = samples_of(text)
    for client in ("client-0", "client-1"):
        used = total(found, "fedsplit_contributions_total", client=client, outcome="used")
        steps = total(found, "fedsplit_client_step_duration_seconds_count", client=client)
        waits = total(found, "fedsplit_barrier_wait_seconds_count", client=client)
        assert used == steps == waits == folder.rounds()[-1].version
    tokens = sum(each.tokens for each in folder.rounds())
    assert total(found, "fedsplit_client_tokens_total") == tokens
    assert total(found, "fedsplit_client_tokens_total", client="other") == 0


def test_a_stranger_gets_no_label_of_its_own() -> None:
    sink = Prometheus("--metrics ", clients=["alice"])
    before = set(exposed(sink))
    # From the beginning, so that the first event is an increase.
    refused = "fedsplit_contributions_total", (("client", "alice"), ("outcome", "refused"))
    assert exposed(sink)[refused] == 0
    for number in range(3):
        sink.on_event(Contributed(client=f"stranger-{number}", outcome="used"))
    sink.on_event(Contributed(client="alice", outcome="refused"))
    found = exposed(sink)
    assert found.keys() == before
    assert total(found, "fedsplit_contributions_total", client="other", outcome="used") == 3
    assert found[refused] == 1


def exposed(sink: Prometheus) -> Samples:
    return samples_of(generate_latest(sink.registry).decode())


def test_client_labels_without_metrics_are_refused(tmp_path: Path, capfd) -> None:
    with pytest.raises(ConfigError, match="launch.client_labels=true needs launch.metrics, which"):
        LaunchSpec(client_labels=True)
    make_model(tmp_path / "model")
    words = ["serve", "--model", str(tmp_path / "model"), "--client-label", "alice"]
    assert main(words) == 1
    assert "--client-label alice needs --metrics, which is missing" in capfd.readouterr().err


def test_the_end_of_a_certificate_is_that_of_the_one_in_use(tmp_path: Path) -> None:
    wire = self_signed(tmp_path, "server")
    sink = Prometheus("--metrics ", certificate=wire.tls_cert)
    name = "fedsplit_certificate_expiry_timestamp_seconds"
    end = sink.registry.get_sample_value(name)
    assert 0 < end - time.time() < 86_401
    # The server has read it at its start.
    Path(wire.tls_cert).write_text("another one")
    assert sink.registry.get_sample_value(name) == end
    broken = Prometheus("--metrics ", certificate=wire.tls_cert)
    assert broken.registry.get_sample_value(name) is None


def test_an_address_that_is_none_or_taken_is_refused() -> None:
    sink = Prometheus("--metrics ")
    for address in ("9600", "unix:/tmp/x", "127.0.0.1:99999", "127.0.0.1:"):
        with pytest.raises(ConfigError, match=f"^--metrics {address} is not host:port"):
            MetricsServer("--metrics ", address, sink)
    server = MetricsServer("--metrics ", "127.0.0.1:0", sink)
    with pytest.raises(ConfigError, match=r"cannot be listened on: .*; choose another address"):
        MetricsServer("--metrics ", server.address, sink)
    with (
        pytest.raises(ConfigError, match="launch.metrics="),
        Outlets(metrics=server.address).opened("server"),
    ):
        pass
    # A client works without metrics then.
    with Outlets(metrics=server.address).opened("client-0", needed=False) as telemetry:
        assert not telemetry
    server.close()


def test_one_process_has_one_set_of_metrics_at_an_address() -> None:
    address = free_address()
    with Outlets(metrics=address).opened("server") as first:
        with Outlets(metrics=address).opened("client-0", needed=False) as second:
            assert first and second
            second.emit(RequestRetried(code="CONN_LOST"))
        found = samples_of(scrape(address))
        assert total(found, "fedsplit_client_retries_total", code="CONN_LOST") == 1
    with Outlets().opened("server") as silent:
        assert not silent


def test_without_the_library_an_error_names_the_extra(monkeypatch, tmp_path: Path, capfd) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    make_model(tmp_path / "model")
    words = ["serve", "--model", tmp_path / "model", "--metrics", "127.0.0.1:0"]
    assert main([str(word) for word in words]) == 1
    wanted = (
        "--metrics needs prometheus-client, which is not installed here: pip install 'fedsplit["
    )
    assert wanted in capfd.readouterr().err
    run = spec_for(tmp_path, "launch.metrics=127.0.0.1:0")
    with pytest.raises(ConfigError, match="launch.metrics needs prometheus-client"):
        federate(run)
    assert not any((tmp_path / "runs").glob("*"))


def test_a_sink_that_is_none_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name a subclass of fedsplit.telemetry.sinks.Sink"):
        federate(spec_for(tmp_path, "launch.sinks=fractions.Fraction"))
    assert not any((tmp_path / "runs").glob("*"))


def test_names_follow_the_conventions_of_prometheus() -> None:
    for name, metric in METRICS.items():
        assert name.startswith("fedsplit_") and metric.text.endswith(".")
        assert name.endswith("_total") == (metric.kind == "counter")
        assert "client" not in metric.labels


def test_tensorboard_has_the_curves_of_a_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = "launch.sinks=fedsplit.telemetry.tensorboard.TensorBoard"
    folder = federate(spec_for(tmp_path, "train.rounds=2", sink))
    curves = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    losses = [(each.step, each.value) for each in curves.Scalars("round/loss")]
    assert losses == [(r.round, pytest.approx(r.loss)) for r in folder.rounds()]
    assert [each.step for each in curves.Scalars("step/gradient_norm")] == [1, 2]
    # What was not measured has no curve.
    assert "round/accuracy" not in curves.Tags()["scalars"]


def test_without_tensorboard_an_error_names_the_extra(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsplit\[tensorboard\]'"):
        TensorBoard(folder=tmp_path)


def test_the_hook_of_the_documentation_is_a_sink_of_ten_lines(monkeypatch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    (hook,) = re.findall(r"```python\n# tracking.py\n(.*?)```", page, re.S)
    imported = ("import ", "from ")
    lines = [line for line in hook.splitlines() if line and not line.startswith(imported)]
    assert len(lines) <= 10
    told: list[tuple[object, ...]] = []
    fake = ModuleType("mlflow")
    fake.start_run = lambda **how: told.append(("start", how["run_name"]))
    fake.log_params = lambda settings: told.append(("params", settings["train.rounds"]))
    fake.log_metrics = lambda numbers, step: told.append((step, numbers["loss"]))
    fake.end_run = lambda: told.append(("end",))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    (tmp_path / "tracking.py").write_text(hook)
    monkeypatch.syspath_prepend(tmp_path)
    folder = federate(spec_for(tmp_path, "train.rounds=2", "launch.sinks=tracking.MLflow"))
    losses = [(stats.round, stats.loss) for stats in folder.rounds()]
    assert told == [("start", "tiny"), ("params", 2), *losses, ("end",)]


def test_the_page_has_every_metric_and_every_alert() -> None:
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    for name, metric in METRICS.items():
        also = ["client"] if metric.by_client else []
        labels = ", ".join(f"`{label}`" for label in [*metric.labels, *also])
        assert f"| `{name}` | {metric.kind} | {labels} | {metric.text} |" in page
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text("utf-8")
    for alert in re.findall(r"alert: (\w+)", rules):
        assert f"| `{alert}` |" in page
