"""A run that is hostile to the machines of its clients: nothing there is run, read or written."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedsplit.config import changed, compose, from_run_config
from fedsplit.config.authority import NODE_KEYS, Authority, authority_of
from fedsplit.data import load_corpus, shard, tokenizer_to_json, train_tokenizer
from fedsplit.errors import ConfigError, DataError, ProtocolError
from fedsplit.flower.inline import run_inline
from fedsplit.flower.records import Hello
from fedsplit.flower.share import own_corpora, partitions_of
from fedsplit.spec import DataSpec, RunSpec, ShardingSpec
from fedsplit.spec.fields import described
from tests.edge.federation import federate, overrides_for, spec_for, write_corpus
from tests.edge.nodes import SuperNode, node_of

SECRET = "hunter2"
RUN_ID = "0123456789abcdef"
FIELDS = {each.name: each for group in described() for each in group.fields}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test finds the corpus of another, and a variable of the machine has a secret."""
    monkeypatch.setenv("SECRET", SECRET)
    for cache in (partitions_of, own_corpora):
        cache.cache_clear()
    yield


def answer_of(node: SuperNode, settings: Mapping[str, str], tokenizer: str = "") -> str:
    """What the server learns by its first message: the text of the reply, or of its error.

    With a tokenizer, the server has the same configuration as the client.
    """
    replies: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        (to,) = grid.get_node_ids()
        config = from_run_config(settings).fingerprint if tokenizer else "another"
        hello = Hello(run_id=RUN_ID, config=config, tokenizer=tokenizer)
        replies.extend(
            grid.send_and_receive(
                [Message(hello.content, dst_node_id=to, message_type="query.hello")]
            )
        )

    app = ServerApp()
    app.main()(main)
    run_inline(app, node, num_clients=1, run_config=dict(settings))
    (reply,) = replies
    if reply.has_error():
        return str(reply.error.reason)
    return " ".join(str(dict(record)) for record in reply.content.config_records.values())


def words_for(folder: Path, *words: str) -> dict[str, str]:
    """The run config of a run of one client, as a submitter types it."""
    return {"overrides": shlex.join(overrides_for(folder, "clients=1", *words))}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    corpus = load_corpus(
        DataSpec(kind="text", path=str(write_corpus(tmp_path_factory.mktemp("t"))))
    )
    return tokenizer_to_json(train_tokenizer(corpus, 300))


def test_a_file_of_trusted_roots_that_cannot_be_read_is_found_before_the_first_round(
    tmp_path: Path, tokenizer: str
) -> None:
    (empty := tmp_path / "ca.crt").touch()
    for path in (empty, tmp_path / "none.crt"):
        node = SuperNode(config={"tls-ca": str(path), "trust-runs": True})
        assert f"wire.tls_ca={path}" in answer_of(node, words_for(tmp_path), tokenizer)
        # A baseline has no trunk.
        words = words_for(tmp_path, "baseline=local")
        assert "client-0" in answer_of(node, words, tokenizer)


# --- the table -----------------------------------------------------------------------------------


HOSTILE = {
    "resume": ["resume=/evil"],
    "model.pretrained": ["model.pretrained=/evil"],
    "model.family": ["model.family=evil"],
    "model.config": ["model.config={auto_map: {AutoModel: evil.Evil}}"],
    "lora.targets": ["lora.targets=/evil"],
    "data.path": ["data.kind=text", "data.path=/evil"],
    "data.field": ["data.field=/evil"],
    "data.label": ["data.label=/evil"],
    "data.split": ["data.split=/evil"],
    "sharding.target": ["sharding.kind=partitioner", "sharding.target=evil.Evil"],
    "sharding.options": ["sharding.options={path: /evil}"],
    "client_weights.strategy": ["client_weights.strategy=evil.Evil"],
    "client_weights.options": ["client_weights.options={path: /evil}"],
    "client_weights.wrap": ["client_weights.wrap=evil.Evil", "policy.missing=wait"],
    "client_weights.wrap_options": ["client_weights.wrap_options={path: /evil}"],
    "wire.bind": ["wire.bind=unix:/evil"],
    "wire.advertise": ["wire.advertise=unix:/evil"],
    "wire.tls_cert": ["wire.tls_cert=/evil", "wire.tls_key=/evil"],
    "wire.tls_key": ["wire.tls_cert=/evil", "wire.tls_key=/evil"],
    "wire.tls_ca": ["wire.tls_ca=/evil"],
    "strategy.target": ["strategy.target=evil.Evil"],
    "privacy.public": ["privacy.public=/evil"],
    "launch.run_dir": ["launch.run_dir=/evil"],
    "launch.trunk_device": ["launch.trunk_device=cuda:9"],
    "launch.client_device": ["launch.client_device=cuda:9"],
    "launch.metrics": ["launch.metrics=evil:1"],
    "launch.traces": ["launch.traces=/evil"],
    "launch.sinks": ["launch.sinks=evil.Evil"],
    "sweep.variants": ["sweep.variants={evil: 'seed=1'}", "sweep.seeds=[1]"],
}
"""A hostile value of every field that takes any text or any mapping."""

FREE = ("text", "a mapping", "a mapping to texts")


def test_every_field_that_may_be_any_text_is_in_the_table() -> None:
    assert HOSTILE.keys() == {name for name, each in FIELDS.items() if each.values in FREE}
    assert NODE_KEYS.keys() == {n for n in FIELDS if authority_of(n) is Authority.NODE}
    # A number, a switch or a word of a list names nothing on a machine.
    assert {authority_of(name) for name in FIELDS.keys() - HOSTILE} == {Authority.RUN}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_field_of_a_run_names_anything_at_a_supernode(name: str) -> None:
    run = changed(RunSpec(), HOSTILE[name])
    if authority_of(name) is Authority.BOTH:
        with pytest.raises(ConfigError, match=rf"^{name}=\S*evil\S* is (not|neither) "):
            node_of(run)
        return
    assert node_of(run) == node_of(RunSpec())
    if authority_of(name) is Authority.NODE:
        key = NODE_KEYS[name].replace("-", "_")
        assert node_of(run, **{key: "mine"}) == node_of(RunSpec(), **{key: "mine"})
        assert "mine" in str(node_of(run, **{key: "mine"}))


def test_a_machine_that_trusts_runs_lets_them_set_all(tmp_path: Path) -> None:
    for name, words in HOSTILE.items():
        node = node_of(changed(RunSpec(), words), trust_runs=True)
        if name in ("wire.tls_ca", "launch.client_device"):
            assert {node.tls_ca, node.device} & {"/evil", "cuda:9"}
    with pytest.raises(ConfigError, match="trust-runs='yes' in the node's config must be true or"):
        node_of(RunSpec(), trust_runs="yes")


# --- callables -----------------------------------------------------------------------------------


def test_a_program_as_partitioner_is_not_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    words = (
        "sharding=partitioner",
        "sharding.target=subprocess.Popen",
        f"sharding.options={{args: [touch, {mark}]}}",
    )
    refused = "sharding.target=subprocess.Popen is not of fedsplit, strategies, flwr or flwr_datas"
    node = SuperNode(config={"allowed-path": str(tmp_path)})
    settings = words_for(tmp_path, *words)
    assert refused in answer_of(node, settings)
    # On a machine that trusts runs, it is no partitioner either, and is not called.
    spec = ShardingSpec(
        kind="partitioner", target="subprocess.Popen", options={"args": ["touch", str(mark)]}
    )
    with pytest.raises(DataError, match="Popen is <class .*; name a subclass of flwr_datasets"):
        shard(load_corpus(DataSpec()), spec, 1, seed=0)
    assert not mark.exists()


def test_a_module_that_a_run_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, mark = tmp_path / "modules", tmp_path / "mark"
    module.mkdir()
    (module / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom strategies import *\n")
    monkeypatch.syspath_prepend(module)
    node = SuperNode(config={"allowed-path": str(tmp_path)})
    settings = words_for(tmp_path, "strategy.target=evil.SplitFedV2")
    assert "strategy.target=evil.SplitFedV2 is not of fedsplit" in answer_of(node, settings)
    assert not mark.exists() and "evil" not in sys.modules
    # The owner of the machine can allow it by its whole path.
    allowed = {**node.config, "targets": "other.Thing evil.SplitFedV2"}
    assert "is not of" not in answer_of(SuperNode(config=allowed), settings)


CALLED: list[dict[str, Any]] = []


def remember(**options: Any) -> None:
    CALLED.append(options)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("strategy.target", "fedsplit.flower.strategy.base.SplitStrategy"),
        ("client_weights.strategy", "flwr.serverapp.strategy.strategy.Strategy"),
        ("client_weights.wrap", "flwr.serverapp.strategy.strategy.Strategy"),
    ],
)
def test_a_function_as_strategy_is_not_called_by_the_server(
    tmp_path: Path, name: str, base: str
) -> None:
    run = spec_for(tmp_path, "clients=1", "policy.missing=wait", f"{name}={__name__}.remember")
    with pytest.raises(ConfigError, match=rf"remember' is <function .*; name a subclass of {base}"):
        federate(run)
    assert CALLED == []
    assert not (tmp_path / "runs").exists()


# --- variables and folders of the machine --------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"overrides": "name=${oc.env:SECRET}"},
        {"overrides": 'name=$"{oc.env:SECRET}"'},
        {"overrides": r"'name=$\{oc.env:SECRET\}'"},
        {"overrides": r"'+model.config.a=[$\{oc.env:SECRET\}]'"},
        {"overrides": r"'model.config={$\{oc.env:SECRET\}: 1}'"},
        {"name": "${oc.env:SECRET}"},
        {"data-path": "a/${oc.env:SECRET}"},
        {"config": "name: ${oc.env:SECRET}"},
        {"config": 'name: "\\x24{oc.env:SECRET}"'},
        {"config": 'model: {config: {a: ["\\u0024{oc.env:SECRET}"]}}'},
    ],
    ids=str,
)
def test_a_variable_of_a_machine_does_not_come_back(settings: dict[str, str]) -> None:
    told = answer_of(SuperNode(), settings)
    assert "interpolation" in told
    assert SECRET not in told


def test_the_users_own_command_line_may_read_a_variable() -> None:
    assert compose(["name=${oc.env:SECRET}"]).name == SECRET


@pytest.mark.parametrize(
    ("word", "refused"),
    [
        ("data.path=~/texts", "~ is another folder on each machine; write the whole path"),
        ("hydra.searchpath=[file:///tmp]", "a run config has fields of a run only; leave it out"),
        ("hydra/launcher=joblib", "a run config has fields of a run only; leave it out"),
    ],
)
def test_a_run_config_means_the_same_on_each_machine(word: str, refused: str) -> None:
    told = answer_of(SuperNode(), {"overrides": word})
    assert f"{word}: {refused}" in told
    assert str(Path.home()) not in told


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"config": "name: " + 1000 * "["}, "config is not YAML of plain values: maximum recurs"),
        (
            {"config": "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]"},
            "config is not YAML of plain values: it has an alias; write the value in its place",
        ),
        ({"overrides": "name=" + 1000 * "["}, "[' cannot be read; put the value in quotes"),
    ],
    ids=["brackets in config", "aliases in config", "brackets in overrides"],
)
def test_a_text_without_an_end_in_sight_is_refused(settings: dict[str, str], refused: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(refused)):
        from_run_config(settings)


# --- files ---------------------------------------------------------------------------------------


def test_a_run_dir_is_neither_written_nor_cleared(tmp_path: Path, tokenizer: str) -> None:
    victim = tmp_path / "victim"
    old = [victim / "tiny" / "clients" / "client-0" / f"{n:016x}" for n in range(9)]
    for folder in old:
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))
    settings = words_for(tmp_path, "train.save_every=1") | {"run-dir": str(victim)}
    node = SuperNode(config={"allowed-path": str(tmp_path)})
    told = answer_of(node, settings, tokenizer)
    assert "'client': 'client-0'" in told and "states" not in told
    assert sorted(path for path in victim.rglob("*") if path.parent.name == "client-0") == old
    # With a folder of its own, the client looks there and nowhere else.
    own = SuperNode(config={**node.config, "state-dir": str(tmp_path / "kept")})
    assert "'states': []" in answer_of(own, settings, tokenizer)
    assert sorted(path for path in victim.rglob("*") if path.parent.name == "client-0") == old


def escapes(folder: Path) -> dict[str, str]:
    """Paths outside of the folder `allowed`, one of them through a link inside of it."""
    (folder / "allowed").mkdir()
    (folder / "secret.txt").write_text(f"{SECRET}\n" * 9)
    (folder / "allowed" / "link").symlink_to(folder / "secret.txt")
    return {
        "absolute": f"{folder}/secret.txt",
        "with dots": f"{folder}/allowed/../secret.txt",
        "by a link": f"{folder}/allowed/link",
        "a neighbor": f"{folder}/allowed-too",
        "relative": "secret.txt",
        "proc": "/proc/self/environ",
    }


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "saved", "hub"])
@pytest.mark.parametrize(
    "way", ["absolute", "with dots", "by a link", "a neighbor", "relative", "proc"]
)
def test_a_data_path_outside_of_the_allowed_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = escapes(tmp_path)[way]
    run = changed(RunSpec(), [f"data.kind={kind}", f"data.path={path}"])
    for allowed in ("", str(tmp_path / "allowed")):
        with pytest.raises(ConfigError, match=r"a path that this client's machine lets runs read"):
            node_of(run, allowed_path=allowed)
    inside = changed(RunSpec(), [f"data.kind={kind}", f"data.path={tmp_path}/allowed/new/x.txt"])
    assert node_of(inside, allowed_path=str(tmp_path / "allowed"))


def test_a_data_set_of_the_hub_is_not_a_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "texts").mkdir(parents=True)
    allowed = str(tmp_path / "allowed")
    for path in ("text", "pandas", "own/texts", "own/texts:x", f"{allowed}/..:x", "../a"):
        run = changed(RunSpec(), ["data.kind=hub", f'data.path="{path}"'])
        with pytest.raises(ConfigError, match="is neither OWNER/NAME of the hub nor a path that"):
            node_of(run, allowed_path=allowed)
    assert node_of(changed(RunSpec(), ["data.kind=hub", "data.path='owner/name:part'"]))


def test_a_model_outside_of_the_allowed_path_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for path in (str(tmp_path / "model"), "model", "./model", "/nowhere"):
        run = changed(RunSpec(), [f"model.pretrained={path}"])
        with pytest.raises(ConfigError, match="model.pretrained=.* is neither OWNER/NAME of the"):
            node_of(run)
        if path != "/nowhere":
            assert node_of(run, allowed_path=str(tmp_path))
    for name in ("gpt2", "owner/name"):
        assert node_of(changed(RunSpec(), [f"model.pretrained={name}"]))
    with pytest.raises(ConfigError, match="model.revision='../../x' must be letters, digits and"):
        changed(RunSpec(), ["model.revision=../../x"])


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "csv", "saved"])
@pytest.mark.parametrize("what", ["pipe", "device", "link to a pipe"])
def test_a_pipe_or_device_as_data_path_is_not_opened(tmp_path: Path, kind: str, what: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    paths = {"pipe": "pipe", "device": "/dev/zero", "link to a pipe": "link"}
    path = str(tmp_path / paths[what])
    with pytest.raises(DataError, match=rf"data.path={path} is a pipe, a socket or a device; dat"):
        load_corpus(DataSpec(kind=kind, path=path))


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="/proc/self/environ has more bytes than its size, 0; copy"):
        load_corpus(DataSpec(kind="text", path="/proc/self/environ"))


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("data=jsonl", "data.path=none", "data.field=id"),
        ("data=jsonl", "data.path=none", "data.field=number"),
        ("data=saved", "data.path=none"),
    ],
    ids=" ".join,
)
def test_an_error_in_a_clients_data_brings_back_nothing_of_it(
    tmp_path: Path, tokenizer: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "private.jsonl").write_text(f'{{"id": [1], "number": 7, "{SECRET}": "{SECRET}"}}\n')
    node = SuperNode(config={"data-path": str(tmp_path / "private.jsonl")})
    settings = words_for(tmp_path, *words)
    told = answer_of(node, settings, tokenizer)
    assert "client-0 stopped with DataError; the log of its SuperNode has the text" in told
    assert SECRET not in told and "private" not in told


def test_a_trunk_is_called_by_host_and_port_only() -> None:
    node = node_of(RunSpec())
    for address in ("10.0.0.1:9500", "trunk.example.org:9500", "[::1]:9500", "localhost:80"):
        assert node.address_of_trunk(address) == address
    for address in ("unix:/run/docker.sock", "unix:80", "dns:80", "a", "a:1/b", "vsock:1:2", ""):
        with pytest.raises(ProtocolError, match="calls host:port only; set wire.advertise=host:po"):
            node.address_of_trunk(address)
    pinned = node_of(RunSpec(), trunk_address="trunk.example.org:9500")
    assert pinned.address_of_trunk("169.254.169.254:80") == "trunk.example.org:9500"


# --- an honest run -------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_honest_run_at_supernodes_has_the_numbers_of_a_simulation(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run = spec_for(tmp_path, "clients=2", "train.save_every=1")
    simulated = federate(run).rounds()
    node = {"allowed-path": str(tmp_path), "state-dir": str(tmp_path / "kept")}
    run = spec_for(tmp_path, "clients=2", "train.save_every=1", "name=deployed")
    deployed = federate(run, SuperNode(config=node)).rounds()
    assert [each.loss for each in deployed] == [each.loss for each in simulated]
    assert sorted(path.name for path in (tmp_path / "kept/deployed").iterdir()) == [
        "client-0",
        "client-1",
    ]
    assert not (tmp_path / "runs/deployed/clients").exists()
