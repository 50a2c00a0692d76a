"""Servers and nodes that are in the way of a new one: alive, dead, or of another run."""

import socket
import threading
from pathlib import Path

import pytest
from flwr.app import Context, Message

from fedsplit.errors import ConfigError, DeadlineExceeded, ModelMismatch
from fedsplit.flower.client_app import app as product
from fedsplit.flower.inline import run_inline
from fedsplit.flower.server_app import app as server
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import WireSpec
from fedsplit.wire import messages as m
from tests.edge.echo import EchoService, linked, serving
from tests.edge.federation import run_config, spec_for


def test_the_unix_socket_of_a_server_that_lives_is_refused(tmp_path: Path) -> None:
    wire = WireSpec(bind=f"unix:{tmp_path}/trunk.sock")
    with serving(EchoService(), wire) as where:
        with (
            pytest.raises(ConfigError, match=f"wire.bind={wire.bind} .*another server listens"),
            serving(EchoService(), wire),
        ):
            pass
        with linked(where, wire=wire) as link:
            assert link.exchange(m.ServiceInfoRequest())


def test_the_unix_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trunk.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    assert path.is_socket()  # nobody has removed it
    wire = WireSpec(bind=f"unix:{path}")
    with serving(EchoService(), wire) as where, linked(where, wire=wire) as link:
        assert link.exchange(m.ServiceInfoRequest())


class Nodes:
    """Two clients of a run of `clients`, and a third node, which behaves as told."""

    def __init__(self, stranger: str, clients: int) -> None:
        self.stranger = stranger
        self.clients = clients
        self.begun = threading.Event()

    def __call__(self, message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2:
            if self.stranger == "dead":
                self.begun.wait(60)
                raise ConnectionError("it has died")
            config = context.run_config["config"].replace("seed: 0", "seed: 1")
            context.run_config = {**context.run_config, "config": config}
            context.node_config["partition-id"] = self.clients - 1
        context.node_config["num-partitions"] = self.clients
        if message.metadata.message_type.startswith("train"):
            self.begun.set()
        return product(message, context)


@pytest.mark.parametrize("stranger", ["dead", "of another run"])
def test_a_node_that_takes_no_part_does_not_keep_a_run_from_starting(
    tmp_path: Path, stranger: str
) -> None:
    run = spec_for(tmp_path, "clients=2", "train.rounds=2")
    run_inline(server, Nodes(stranger, clients=2), num_clients=3, run_config=run_config(run))
    (folder,) = Path(run.launch.run_dir).iterdir()
    assert [stats.clients for stats in RunFolder(folder).rounds()] == [2, 2]


@pytest.mark.parametrize(
    ("stranger", "error", "text"),
    [
        ("dead", DeadlineExceeded, r"1 of 3 nodes did not answer within 1 s: \d+; look at"),
        ("of another run", ModelMismatch, "runs configuration [0-9a-f]{16}, the server"),
    ],
)
def test_with_too_few_others_the_run_says_which_node_is_missing(
    tmp_path: Path, stranger: str, error: type[Exception], text: str
) -> None:
    run = spec_for(tmp_path, "clients=3", "launch.start_timeout_s=1")
    nodes = Nodes(stranger, clients=3)
    threading.Timer(3, nodes.begun.set).start()  # the inline run waits for all its threads
    with pytest.raises(error, match=text):
        run_inline(server, nodes, num_clients=3, run_config=run_config(run))
