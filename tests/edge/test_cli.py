"""The `fedsplit` command: as installed in a process of its own, and its errors in this one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config

from fedsplit.cli import main
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.model import ClientPart, TrunkPart, connect, initial_parts
from fedsplit.model.checkpoint import load_part, model_fingerprint, split_checkpoint
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec, SplitSpec, WireSpec
from fedsplit.telemetry.round import RoundStats
from fedsplit.wire import messages as m
from simulations.bench.certificate import self_signed
from tests.edge.commands import COMMAND
from tests.edge.echo import EchoService, serving
from tests.edge.forked import Program
from tests.house.source import ROOT

SPLIT = SplitSpec.parse("1/2/1")
TENSOR = "model.layers.1.mlp.up_proj.weight"


def fedsplit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, its parts in two cuts, a model that cannot be cut, and a run; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    sizes = dict(hidden_size=16, intermediate_size=32, vocab_size=64, max_position_embeddings=64)
    heads = dict(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaForCausalLM.config_class(**sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder / "whole", max_shard_size="20KB")
    (folder / "whole" / "tokenizer.json").write_text("{}")
    split_checkpoint(str(folder / "whole"), SPLIT, folder / "parts")
    split_checkpoint(str(folder / "whole"), SplitSpec.parse("2/1/1"), folder / "others")
    T5Config().save_pretrained(folder / "t5")
    _run_folder(folder / "run")
    return folder


def _run_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text("name: run\n")
    counts = dict.fromkeys(["tokens", "bytes_up", "bytes_down", "client_weights_bytes"], 100)
    numbers = dict(loss=2.0, eval_loss=2.0, bits_per_byte=3.0, seconds=1.0, version=5)
    for number in (1, 2):
        told = dict(round=number, rounds=2, clients=4, late=0, failed=0)
        RunFolder(folder).metrics.append(RoundStats(**told, **counts, **numbers))


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of what was made, which is the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    return tmp_path


# --- what works ------------------------------------------------------------------------------


def test_there_and_back_again_by_command(here, capsys):
    assert main(f"split {here}/whole --split 1/2/1 --out {here}/new".split()) == 0
    printed, errors = capsys.readouterr()
    whole = AutoModelForCausalLM.from_pretrained(here / "whole")
    fingerprint = model_fingerprint(whole.config, SPLIT)
    assert errors == ""
    assert printed.splitlines() == [
        f"{here}/new/bottom-top: 2 blocks, 21 tensors, 0.0 MiB, fingerprint {fingerprint}",
        f"{here}/new/trunk: 2 blocks, 18 tensors, 0.0 MiB, fingerprint {fingerprint}",
    ]
    shutil.rmtree(here / "whole")
    client, trunk = _each_loaded_alone(here / "new")
    connect(client, trunk.run)
    ids_BT = torch.arange(12).reshape(2, 6)
    assert torch.equal(client(ids_BT).logits, whole(ids_BT).logits)
    assert main(f"join {here}/client {here}/server --out {here}/joined".split()) == 0
    assert capsys.readouterr().err == ""
    joined = AutoModelForCausalLM.from_pretrained(here / "joined").state_dict()
    assert joined.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, joined[k]) for k, tensor in whole.state_dict().items())
    assert (here / "joined" / "tokenizer.json").read_text() == "{}"


def _each_loaded_alone(parts: Path) -> tuple[ClientPart, TrunkPart]:
    """Both parts, each while the other one is nowhere; leaves them in `client` and `server`."""
    home = parts.parent
    (parts / "trunk").rename(home / "away")
    (parts / "bottom-top").rename(home / "client")
    client = load_part(home / "client")
    (home / "client").rename(home / "client-away")
    (home / "away").rename(home / "server")
    trunk = load_part(home / "server")
    (home / "client-away").rename(home / "client")
    assert isinstance(client, ClientPart)
    assert isinstance(trunk, TrunkPart)
    return client, trunk


def test_what_is_written_is_the_same_by_any_path(here):
    (here / "empty").mkdir()
    assert main("split whole --split 1/*/1 --out empty".split()) == 0
    assert main("split whole --split 1/2/1 --out deep/below".split()) == 0
    for name in ("bottom-top", "trunk"):
        files = {path.name for path in (here / "parts" / name).iterdir()}
        assert {path.name for path in (here / "empty" / name).iterdir()} == files
        weights = (here / "parts" / name / "part.safetensors").read_bytes()
        assert (here / "deep" / "below" / name / "part.safetensors").read_bytes() == weights
    assert sorted(path.name for path in (here / "empty").iterdir()) == ["bottom-top", "trunk"]


@contextmanager
def _trunk_server(tiny_gpt2, wire: WireSpec) -> Iterator[str]:
    run = RunSpec(split=SPLIT, wire=wire)
    with TrunkServer(initial_parts(tiny_gpt2(), SPLIT, seed=0).trunk, run) as host:
        yield host.address


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
def test_info_says_what_the_server_is(kind, here, tiny_gpt2, capfd):
    wires = {
        "tcp": WireSpec(),
        "unix": WireSpec(bind=f"unix:{here}/s"),
        "tls": self_signed(here, "a"),
    }
    trust = ["--tls-ca", "a.pem"] if kind == "tls" else []
    with _trunk_server(tiny_gpt2, wires[kind]) as address:
        assert main(["info", address, *trust]) == 0
    told = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert told["family"] == "gpt2"
    assert told["blocks (bottom/trunk/top)"] == "1/2/1"
    assert told["fingerprint of model and cut"] == model_fingerprint(tiny_gpt2(), SPLIT)
    assert told["largest request"] == "8 sequences of 128 tokens"
    assert told["open sessions"] == told["parameter version"] == "0"
    assert len(told) == 9


class Rude(EchoService):
    """Lets anybody in, and answers with what a terminal would obey."""

    def check_token(self, token: str) -> str:
        return ""

    def ServiceInfoRequest(self, request: m.ServiceInfoRequest) -> m.ServiceInfoReply:
        return replace(super().ServiceInfoRequest(request), family="\x1b[2Jgpt2\nblocks  all")


def test_info_prints_nothing_that_a_terminal_obeys(here, capfd):
    with serving(Rude()) as address:
        assert main(["info", address]) == 1
    told = capfd.readouterr()
    refusal = "error: the trunk answered family='[2Jgpt2 blocks all', which is not legal\n"
    assert (told.out, told.err) == ("", refusal)


def test_plot_draws_the_loss_again(here, capfd):
    assert main(["plot", "run"]) == 0
    assert capfd.readouterr().out == "run/loss.png\n"
    assert (here / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["split", "join", "info", "plot", "compare", "shards"])
def test_help_shows_an_example_and_says_what_each_argument_is(command, capsys):
    assert main(["--help"]) == 0
    general = capsys.readouterr().out
    assert main([command, "-h"]) == 0
    shown = capsys.readouterr().out
    own = " ".join(shown.split())
    example = own.partition("example: ")[2]
    assert example.startswith(f"fedsplit {command} ")
    assert example in general
    summary = re.search(rf"^\W+{command}  +(.+?) *\W$", general, re.M)[1]
    assert summary in own
    arguments = re.search(r"Arguments.*?\n(.*?)Options", shown, re.S)[1]
    assert re.search(r"\b(directory|folder|host:port|field=value)\b", arguments)


def test_a_shell_completes_commands_and_choices():
    assert completed("fedsplit s") == ["split", "shards", "serve", "supervise"]
    assert completed("fedsplit generate --kv ") == ["server", "client"]
    assert "--max-new-tokens" in completed("fedsplit chat --m")


def completed(line: str) -> list[str]:
    """What bash offers after `line`."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    environment = os.environ | words | {"_FEDSPLIT_COMPLETE": "complete_bash"}
    pipes = dict(capture_output=True, text=True, timeout=120)
    return subprocess.run(COMMAND, cwd=ROOT, env=environment, **pipes).stdout.split()


def test_no_argument_prints_the_help_and_version_the_version(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert bare == capsys.readouterr().out and "--install-completion" in bare
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsplit {version('fedsplit')}\n"


def test_help_waits_for_no_library():
    code = """
import sys
from fedsplit.cli import main
main(["--help"])
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr.split()
    assert "fedsplit" in loaded
    heavy = {"torch", "transformers", "numpy", "safetensors", "grpc", "flwr", "hydra", "matplotlib"}
    assert not heavy & set(loaded)


# --- what does not -----------------------------------------------------------------------------


def _drop_a_tensor(here: Path) -> None:
    shard = next(
        s for s in sorted((here / "whole").glob("*.safetensors")) if TENSOR in load_file(s)
    )
    tensors = load_file(shard)
    del tensors[TENSOR]
    save_file(tensors, shard)


def _drop_a_shard(here: Path) -> None:
    sorted((here / "whole").glob("*.safetensors"))[1].unlink()


def _truncate_a_shard(here: Path) -> None:
    shard = sorted((here / "whole").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])


def _drop_all_weights(here: Path) -> None:
    for file in (here / "whole").glob("model*"):
        file.unlink()


def _flip_a_bit(here: Path) -> None:
    file = here / "parts" / "trunk" / "part.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _file(name: str, text: str) -> Callable[[Path], object]:
    return lambda here: (here / name).write_text(text)


REFUSED = {
    "a wrong path": (
        "split nowhere --split 1/2/1 --out new",
        r"nowhere: there is no such directory here, .*HF_HUB_OFFLINE is set; correct the path",
    ),
    "a bad split": (
        "split whole --split 1-2-1 --out new",
        r"split='1-2-1' is not of the form bottom/trunk/top, e.g. 1/2/1",
    ),
    "too large a split": (
        "split whole --split 3/1/3 --out new",
        r"split.bottom \+ split.top = 6, but LlamaForCausalLM has 4 blocks",
    ),
    "an unsupported model": (
        "split t5 --split 1/2/1 --out new",
        r"T5Config: transformers has no causal language model for model type 't5'",
    ),
    "a folder in the way": (
        "split whole --split 1/2/1 --out parts",
        r"--out parts is there already",
    ),
    "a file in the way": (
        "join parts/bottom-top parts/trunk --out whole/config.json",
        r"--out whole/config.json is there already",
    ),
    "a place below a file": (
        "join parts/bottom-top parts/trunk --out whole/config.json/new",
        r"whole/config.json/new cannot be written: Not a directory",
    ),
    "no part": (
        "join whole parts/trunk --out new",
        r"whole: no readable manifest.json; give a directory that `fedsplit split` wrote",
    ),
    "parts in the wrong order": (
        "join parts/trunk parts/bottom-top --out new",
        r"join needs the bottom-top part first and the trunk second",
    ),
    "parts of two cuts": ("join parts/bottom-top others/trunk --out new", r"parts do not fit"),
    "nobody at the address": (
        "info 127.0.0.1:1",
        r"no trunk answers at 127.0.0.1:1: .*; check that the trunk server is running",
    ),
    "no socket at the address": ("info unix:none.sock", r"no trunk answers at unix:none.sock"),
    "an address without a port": (
        "info localhost",
        r"ADDRESS='localhost' is neither host:port nor",
    ),
    "no file of an authority": (
        "info 127.0.0.1:1 --tls-ca none.pem",
        r"error: --tls-ca=none.pem cannot be read",
    ),
    "a file of an authority that has none": (
        "info 127.0.0.1:1 --tls-ca whole/config.json",
        r"error: --tls-ca=whole/config.json has no certificate that can be read",
    ),
    "no run's folder": ("plot whole", r"whole is not a run's folder: it has no config.yaml"),
}
CUT = "split whole --split 1/2/1 --out new"
JOIN = "join parts/bottom-top parts/trunk --out new"
DAMAGED = {
    "a config that is none": (
        CUT,
        _file("whole/config.json", "{"),
        r"whole/config.json: not JSON",
    ),
    "a missing tensor": (CUT, _drop_a_tensor, rf"whole/model-.*: cannot be read .*{TENSOR}"),
    "a missing shard": (
        CUT,
        _drop_a_shard,
        r"model-00002-of-\d+.safetensors is missing, but model",
    ),
    "a damaged shard": (CUT, _truncate_a_shard, r"model-00002-of-\d+.safetensors: cannot be read"),
    "no safetensors": (
        CUT,
        _drop_all_weights,
        r"no model.safetensors; fedsplit reads safetensors only",
    ),
    "a damaged part": (JOIN, _flip_a_bit, r"trunk/part.safetensors: sha256 is .* copy it again"),
    "a run without a round": (
        "plot run",
        _file("run/metrics.jsonl", ""),
        r"run has no finished round yet",
    ),
    "metrics that are none": (
        "plot run",
        _file("run/metrics.jsonl", '{"x": 1}\n'),
        r"run/metrics.jsonl does not hold the rounds of a run: .*'x'",
    ),
}


@pytest.mark.parametrize(("line", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_clear_line(line, text, here, capfd):
    _fails_in_one_line(line, text, here, capfd)


@pytest.mark.parametrize(("line", "damage", "text"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_one_clear_line(line, damage, text, here, capfd):
    damage(here)
    _fails_in_one_line(line, text, here, capfd)


def _fails_in_one_line(line: str, text: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = _content(here)
    assert main(line.split()) == 1
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert re.search(text, told.err), told.err
    assert _content(here) == before


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_after_an_error_the_same_directory_can_be_given_again(here):
    assert main("split whole --split 3/1/3 --out new".split()) == 1
    assert main("split whole --split 1/2/1 --out new".split()) == 0


def test_an_error_in_a_process_of_its_own(here, tiny_gpt2):
    self_signed(here, "b")
    with _trunk_server(tiny_gpt2, self_signed(here, "a")) as address:
        done = fedsplit("info", address, "--tls-ca", here / "b.pem")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: no encrypted connection to {address}: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_is_quiet():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with Program("fedsplit", "info", f"127.0.0.1:{silent.getsockname()[1]}") as info:
            silent.settimeout(60)
            connection, _ = silent.accept()  # so it waits for an answer
            info.send_signal(signal.SIGINT)
            assert info.end(timeout_s=60) == (130, "", "")
            connection.close()


def test_output_that_nobody_reads_ends_the_command_quietly(here):
    reader, writer = os.pipe()
    os.close(reader)  # as `head -0` does
    pipes = dict(stdout=writer, stderr=subprocess.PIPE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "plot", "run"]
    with subprocess.Popen(command, cwd=here, env=environment, **pipes) as process:
        os.close(writer)
        told = process.communicate(timeout=120)[1]
    assert (process.returncode, told) == (141, b"")


def test_a_wrong_command_line_shows_how_it_is_used(capsys):
    assert main(["split", "whole"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Usage: fedsplit split [OPTIONS] MODEL\n")
    assert error.endswith("Error: Missing option '--split'.\n")


def test_the_package_can_be_run_as_the_command():
    command = [sys.executable, "-m", "fedsplit", "info", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: ADDRESS='nowhere' is neither host:port nor unix:path\n"
