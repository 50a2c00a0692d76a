"""Split training and unsplit training, side by side: no digit of loss or weight differs."""

import json
import os

import pytest

from fedsplit.client.remote import RemoteTrunk
from fedsplit.errors import ConfigError
from simulations.parity import Parity, compare, compare_servers
from tests.edge.forked import Program

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]
FAMILIES = (
    "gpt2 llama qwen2 qwen3 mistral gemma2 gemma3_text opt gpt_neox phi3 bloom falcon olmoe granite"
)


def difference(**asked: object) -> tuple[float, float]:
    found = compare(Parity(**asked))  # type: ignore[arg-type]
    return found.max_loss_diff, found.max_weight_diff


@pytest.mark.parametrize("family", FAMILIES.split())
def test_every_family(family: str) -> None:
    assert difference(family=family, steps=2) == (0.0, 0.0)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_over_the_wire(family: str, lora: bool, tied: str) -> None:
    asked = {"family": family, "lora": lora, "tied": tied, "steps": 3, "link": "grpc"}
    assert difference(**asked, clip_norm=0.5, accumulation=2) == (0.0, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("link", ["local", "grpc"])
def test_every_optimizer(optimizer: str, link: str) -> None:
    assert difference(optimizer=optimizer, link=link, steps=3, seed=7) == (0.0, 0.0)


class NormOfTheClientOnly(RemoteTrunk):
    """Leaves the trunk's gradient out of the norm that the client clips by."""

    trunk_sq_norm = 0.0


def test_a_difference_would_be_seen() -> None:
    found = compare(Parity(steps=3, clip_norm=0.01, optimizer="sgd"), NormOfTheClientOnly)
    assert found.max_loss_diff > 0.0 and found.max_weight_diff > 0.0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("link=tcp", "link=tcp is not one of: local, grpc"),
        ("tied=maybe", "tied=maybe is not one of: default, true, false"),
        ("steps=0", "steps=0 is too small; it must be at least 1"),
        ("steps=two", "steps=two: 'two' is not int"),
        ("speed=1", "'speed' is not one of: family, steps, link"),
        ("optimizer=lion", "train.optimizer='lion' is not one of: adamw, adam, sgd"),
        ("lora=maybe", "lora=maybe: 'maybe' is not bool"),
    ],
)
def test_a_wrong_setting_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(Parity.parse([word]))


def program(*words: str) -> tuple[int, str, str]:
    return Program("simulations.parity", *words).end()


def test_the_program_s_last_line() -> None:
    code, stdout, stderr = program("family=llama", "steps=2", "link=grpc")
    line = "parity: llama steps=2 link=grpc max_loss_diff=0.0 max_weight_diff=0.0"
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1] == line


def test_the_program_as_json() -> None:
    code, stdout, stderr = program("family=gpt2", "steps=1", "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == {
        "family": "gpt2",
        "steps": 1,
        "link": "local",
        "max_loss_diff": 0.0,
        "max_weight_diff": 0.0,
    }


def test_the_program_refuses_in_a_line() -> None:
    code, stdout, stderr = program("family=nope", "steps=1")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("parity: ")


def test_output_that_nobody_reads_ends_the_program_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head -0` does
    ended = Program("simulations.parity", "steps=1", output=writer)
    os.close(writer)
    assert ended.end() == (141, "", "")


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"clip_norm": 0.1}, id="sync"),
        pytest.param({"policy": "quorum", "lora": True, "link": "grpc"}, id="quorum"),
    ],
)
def test_two_servers_train_what_one_trains(asked: dict[str, object]) -> None:
    asked = {"family": "llama", "steps": 3, "clients": 3, "trunk_servers": 2, **asked}
    found = compare_servers(Parity(**asked))  # type: ignore[arg-type]
    assert (found.max_loss_diff, found.max_weight_diff) == (0.0, 0.0)
