"""A spec refuses wrong values by name, is frozen, and its fingerprint tells runs apart."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from fedsplit.errors import ConfigError
from fedsplit.spec import (
    DataSpec,
    LaunchSpec,
    LoraSpec,
    ModelSpec,
    PolicySpec,
    RunSpec,
    ShardingSpec,
    SplitSpec,
    TrainSpec,
    WireSpec,
)


@pytest.mark.parametrize(
    ("text", "num_blocks", "cut"),
    [("1/2/1", 4, (1, 3)), ("1/*/1", 4, (1, 3)), ("2/*/1", 12, (2, 11)), (" 1/1/1 ", 3, (1, 2))],
)
def test_cut(text, num_blocks, cut):
    split = SplitSpec.parse(text)
    assert split.cut(num_blocks) == cut
    assert SplitSpec.parse(str(split)) == split


@pytest.mark.parametrize(
    ("text", "num_blocks", "message"),
    [
        ("5/*/4", 9, r"split.bottom \+ split.top = 9, but m has 9 blocks .* at least 1; lower"),
        ("1/2/1", 12, r"covers 4 blocks, but m has 12; make them equal, or write 1/\*/1"),
        ("2/4/2", 4, r"split.bottom \+ split.top = 4, but m has 4 blocks .* at least 4"),
    ],
)
def test_a_cut_that_does_not_fit_the_model_is_refused(text, num_blocks, message):
    with pytest.raises(ConfigError, match=message):
        SplitSpec.parse(text).cut(num_blocks, "m")


@pytest.mark.parametrize("text", ["", "1/2", "1-2-1", "a/b/c", "1/2/1/1", "-1/2/1", "1.5/2/1"])
def test_a_split_that_is_not_three_numbers_is_refused(text):
    with pytest.raises(ConfigError, match="not of the form bottom/trunk/top"):
        SplitSpec.parse(text)


REFUSED = [
    (lambda: SplitSpec(bottom=0), "split.bottom=0 is too small"),
    (lambda: SplitSpec.parse("1/0/1"), "leaves the trunk no block"),
    (lambda: SplitSpec.parse("1/2/0"), "split.top=0 is too small"),
    (lambda: ModelSpec(attention="flash_attention_2"), "not available yet; allowed: eager, sdpa"),
    (lambda: ModelSpec(dtype="float64"), "model.dtype='float64' is not one of: float32, bfloat16"),
    (lambda: ModelSpec(family=""), "both empty; set one of them"),
    (lambda: LoraSpec(rank=0), "lora.rank=0 is too small"),
    (lambda: LoraSpec(dropout=1.0), r"lora.dropout=1.0 is out of range; it must be in \[0.0, 1.0"),
    (lambda: LoraSpec(enabled=True, bottom=False, trunk=False, top=False), "nothing would train"),
    (lambda: DataSpec(kind="csv"), "data='csv' is not one of: embedded, text, jsonl, hub"),
    (lambda: DataSpec(kind="text"), "data.path is empty, but data=text needs one"),
    (lambda: DataSpec(sequence_length=1), "data.sequence_length=1 is too small"),
    (lambda: ShardingSpec(kind="dirichlet"), "sharding=dirichlet is not available yet; allowed"),
    (lambda: PolicySpec(kind="async"), "policy=async is not available yet; allowed: sync"),
    (lambda: PolicySpec(kind="quorum"), "policy=quorum is not available yet; allowed: sync"),
    (lambda: PolicySpec(deadline_s=0), "policy.deadline_s=0 must be greater than 0"),
    (lambda: WireSpec(codec="int8"), "wire.codec=int8 is not available yet; allowed: none"),
    (lambda: WireSpec(tls_cert="a"), "wire.tls_cert and wire.tls_key go together"),
    (lambda: WireSpec(bind="0.0.0.0:1", insecure=True), "set wire.advertise=host:port"),
    (lambda: WireSpec(bind="0.0.0.0:1"), "without encryption; set wire.tls_cert and wire.tls_key"),
    (lambda: LaunchSpec(kind="ray"), "launch='ray' is not one of: inline, flwr"),
    (lambda: TrainSpec(rounds=0), "train.rounds=0 is too small"),
    (lambda: TrainSpec(lr=math.nan), "train.lr=nan must be greater than 0"),
    (lambda: TrainSpec(lr=math.inf), "train.lr=inf must be greater than 0"),
    (lambda: TrainSpec(beta1=1.0), "train.beta1=1.0 is out of range"),
    (lambda: TrainSpec(mode="isolated"), "train.mode=isolated is not available yet; allowed"),
    (lambda: TrainSpec(optimizer="lion"), "train.optimizer='lion' is not one of: adamw"),
    (lambda: RunSpec(name="a b"), "name='a b' must be 1 to 64 of the characters"),
    (lambda: RunSpec(clients=0), "clients=0 is too small; it must be at least 1"),
    (lambda: RunSpec(seed=-1), "seed=-1 is too small"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_value_is_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "wire",
    [
        WireSpec(bind="localhost:0"),
        WireSpec(bind="[::1]:5"),
        WireSpec(bind="unix:/tmp/trunk.sock"),
        WireSpec(bind="0.0.0.0:1", advertise="trunk:1", insecure=True),
        WireSpec(bind="192.0.2.1:1", tls_cert="c", tls_key="k"),
    ],
    ids=lambda wire: wire.bind,
)
def test_an_address_is_local_or_said_to_be_open(wire):
    assert wire.is_local == (not wire.bind.startswith(("0.0.0.0", "192.0.2")))


@pytest.mark.parametrize(
    ("schedule", "lrs"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)]),
    ],
)
def test_schedule(schedule, lrs):
    train = TrainSpec(rounds=2, local_steps=3, warmup_steps=2, lr=1.0, schedule=schedule)
    assert [train.lr_at(step) for step in range(train.total_steps)] == pytest.approx(lrs)


def test_the_schedule_stays_at_its_end():
    train = TrainSpec(rounds=1, local_steps=2, warmup_steps=5, lr=1.0, schedule="linear")
    assert train.lr_at(1_000) == 0.0


def test_a_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        RunSpec().seed = 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (dict(name="other"), True),
        (dict(launch=LaunchSpec(kind="flwr", run_dir="/elsewhere")), True),
        (dict(seed=1), False),
        (dict(clients=5), False),
        (dict(split=SplitSpec(bottom=2)), False),
        (dict(model=ModelSpec(config={"n_layer": 3})), False),
        (dict(train=TrainSpec(lr=0.1)), False),
    ],
    ids=str,
)
def test_the_fingerprint_tells_runs_with_other_numbers_apart(change, same):
    assert (replace(RunSpec(), **change).fingerprint == RunSpec().fingerprint) is same
