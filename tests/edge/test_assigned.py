"""SuperNodes whose config has a data-path and no partition: the server assigns their partitions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedsplit.data import load_corpus
from fedsplit.errors import ConfigError, Diverged, ProtocolError
from fedsplit.flower.node import Node
from fedsplit.runs.folder import new_run_id
from fedsplit.runs.model_card import model_card
from fedsplit.spec import RunSpec
from fedsplit.telemetry.round import ClientStats
from tests.edge.federation import federate, joined, spec_for, without_seconds, write_corpus
from tests.edge.nodes import SuperNodes
from tests.edge.resuming import breaking_in

RUN = ("clients=2", "train.rounds=2", "train.save_every=1")


def machines(folder: Path) -> list[dict[str, Any]]:
    """The configs of two machines, each with text of its own and a place for its state."""
    return [
        {
            "data-path": str(write_corpus(folder / name, documents=number)),
            "state-dir": str(folder / name / "state"),
        }
        for name, number in (("one", 30), ("two", 50))
    ]


@pytest.mark.slow
def test_nodes_without_a_partition_train_as_those_that_have_one(tmp_path: Path) -> None:
    own = machines(tmp_path)
    numbered = [{**each, "partition-id": i, "num-partitions": 2} for i, each in enumerate(own)]
    run = spec_for(tmp_path, *RUN)
    expected = federate(replace(run, name="numbered"), SuperNodes(configs=numbered))
    with pytest.raises(Diverged, match="stopped with Internal|the power is gone"):
        federate(run, SuperNodes(configs=own, app=breaking_in(2)))
    # The server sees them in the other order, but each has its state under the name it was given.
    found = federate(replace(run, resume="auto"), SuperNodes(configs=own[::-1]))
    assert without_seconds(found.rounds()) == without_seconds(expected.rounds())
    weights = joined(expected)
    assert all(tensor.equal(weights[name]) for name, tensor in joined(found).items())


def test_a_node_without_a_partition_gets_what_the_others_leave(tmp_path: Path) -> None:
    first, second = machines(tmp_path)
    configs = [first, {**second, "partition-id": 0, "num-partitions": 2}]
    run = spec_for(tmp_path, "clients=2")
    folder = federate(run, SuperNodes(configs=configs))
    assert [(stats.clients, stats.failed) for stats in folder.rounds()] == [(2, 0)]
    assert all(each.own_data for each in folder.rounds()[0].by_client.values())
    card = (folder.model / "README.md").read_text(encoding="utf-8")
    assert "| data | each client's own, which the server has not seen |" in card
    assert "corpus" not in card
    # A client that fails in a later round has trained on its own data all the same.
    first = folder.rounds()[0]
    failed = {name: ClientStats(failed=1) for name in first.by_client}
    later = replace(first, round=2, by_client=failed)
    corpus = load_corpus(run.data, run.task)
    again = model_card(run, "1/1/1", "sdpa", corpus, "bytes", [first, later])
    assert "| data | each client's own, which the server has not seen |" in again


RUN_SPEC = RunSpec(clients=2)


def context_of(config: dict[str, Any]) -> Context:
    """The context of a SuperNode that trusts no run."""
    return Context(
        run_id=1,
        node_id=1,
        node_config={"trust-runs": False, **config},
        state=RecordDict(),
        run_config={},
    )


def test_a_node_learns_its_partition_from_the_server(tmp_path: Path) -> None:
    run_id = new_run_id()
    node = Node.of(context_of({"data-path": "/srv/text"}), RUN_SPEC)
    assert (node.name, node.checkpoints_of(RUN_SPEC, run_id)) == ("", None)
    config = {"data-path": "/srv/text", "state-dir": str(tmp_path)}
    node = Node.of(context_of(config), RUN_SPEC, assigned="client-1")
    assert node.name == "client-1"
    # Noise and ledger are of the text, whatever the name.
    assert node.secrets_of(RUN_SPEC, run_id) == tmp_path / "privacy" / "own"


def test_a_name_that_no_client_has_is_refused() -> None:
    with pytest.raises(ProtocolError, match="assigned the name 'client-2', but .* client-0 to"):
        Node.of(context_of({"data-path": "/srv/text"}), RUN_SPEC, assigned="client-2")


def test_the_states_of_several_clients_are_refused(tmp_path: Path) -> None:
    run_id = new_run_id()
    for name in ("client-0", "client-1"):
        (tmp_path / RUN_SPEC.name / name / run_id).mkdir(parents=True)
    node = Node.of(context_of({"data-path": "/srv", "state-dir": str(tmp_path)}), RUN_SPEC)
    with pytest.raises(ConfigError, match="has the states of client-0, client-1; give each"):
        node.known_as(RUN_SPEC, run_id)
