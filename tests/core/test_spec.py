"""A spec refuses wrong values by name, is frozen, and its fingerprint tells runs apart."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from fedsplit.errors import ConfigError
from fedsplit.spec import (
    ClientWeightsSpec,
    DataSpec,
    GenerationSpec,
    LaunchSpec,
    LoraSpec,
    ModelSpec,
    PolicySpec,
    RunSpec,
    ShardingSpec,
    SplitSpec,
    SweepSpec,
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


def simulated(client="client-0", **changes):
    return RunSpec(policy=PolicySpec(sim_slowdown={client: 2.0}), **changes)


REFUSED = [
    (lambda: SplitSpec(bottom=0), "split.bottom=0 is too small"),
    (lambda: SplitSpec.parse("1/0/1"), "leaves the trunk no block"),
    (lambda: SplitSpec.parse(f"1/{'9' * 5000}/1"), "is not of the form bottom/trunk/top"),
    (lambda: SplitSpec.parse("1/2/0"), "split.top=0 is too small"),
    (lambda: ModelSpec(attention="flex"), "is not one of: auto, flash_attention_2, sdpa, eager"),
    (lambda: ModelSpec(autocast="fp16"), "is not one of: off, auto, bfloat16, float16"),
    (lambda: TrainSpec(micro_batches=0), "train.micro_batches=0 is too small"),
    (lambda: TrainSpec(checkpointing="top"), "is not one of: none, trunk, client, all"),
    (lambda: TrainSpec(compile_trunk="reduce-overhead"), "is not available yet; allowed: off, d"),
    (lambda: TrainSpec(optimizer="adam_8bit"), "is not one of: adamw, adam, sgd, adamw_8bit, pa"),
    (lambda: ModelSpec(dtype="float64"), "model.dtype='float64' is not one of: float32, bfloat16"),
    (lambda: ModelSpec(family=""), "both empty; set one of them"),
    (lambda: LoraSpec(rank=0), "lora.rank=0 is too small"),
    (lambda: LoraSpec(dropout=1.0), r"lora.dropout=1.0 is out of range; it must be in \[0.0, 1.0"),
    (lambda: LoraSpec(enabled=True, bottom=False, trunk=False, top=False), "nothing would train"),
    (
        lambda: DataSpec(kind="xml"),
        "data.kind='xml' is not one of: embedded, text, jsonl, parquet, csv, saved,",
    ),
    (lambda: DataSpec(kind="text"), "data.path is empty, but data=text needs one"),
    (lambda: DataSpec(sequence_length=1), "data.sequence_length=1 is too small"),
    (
        lambda: DataSpec(sequence_length=10**9),
        "sequence_length=1000000000 is too large; .* 1048576",
    ),
    (lambda: ShardingSpec(kind="random"), "sharding.kind='random' is not one of: iid, natural"),
    (lambda: ShardingSpec(alpha=0), "sharding.alpha=0 must be greater than 0"),
    (lambda: ShardingSpec(classes=0), "sharding.classes=0 is too small"),
    (lambda: ShardingSpec(alpha=1e308), r"sharding.alpha=1e\+308 is too large; .* 1000000000000"),
    (lambda: ShardingSpec(kind="iid", skew=1e308), r"sharding.skew=1e\+308 is too large; .* 16"),
    (lambda: ShardingSpec(skew=1), "sharding.skew=1 goes with sharding=iid or shards"),
    (lambda: ShardingSpec(target="a.B"), "a target goes with sharding=partitioner"),
    (lambda: ShardingSpec(kind="partitioner"), "needs one, such as flwr_datasets"),
    (lambda: PolicySpec(kind="fast"), "policy.kind='fast' is not one of: sync, async, quorum"),
    (lambda: PolicySpec(deadline_s=0), "policy.deadline_s=0 must be greater than 0"),
    (lambda: PolicySpec(quorum=2.5), "policy.quorum=2.5 is neither a fraction"),
    (lambda: PolicySpec(quorum=0), "policy.quorum=0 must be greater than 0"),
    (lambda: PolicySpec(mixing=1.5), "policy.mixing=1.5 is too large; it must be at most 1"),
    (lambda: PolicySpec(buffer=0), "policy.buffer=0 is too small"),
    (lambda: PolicySpec(discount="log"), "policy.discount='log' is not one of: constant"),
    (lambda: PolicySpec(sim_slowdown={"client-0": 0.5}), "sim_slowdown of client-0=0.5 is too sm"),
    (lambda: PolicySpec(sim_slowdown={"client-0": 1e308}), r"client-0=1e\+308 is too large; it"),
    (
        lambda: ClientWeightsSpec(personal="head"),
        "client_weights.personal='head' is not one of: none, bottom",
    ),
    (lambda: WireSpec(up="zip"), "wire.up='zip' is not one of: none, bf16, fp16"),
    (
        lambda: WireSpec(client_weights="int4"),
        "wire.client_weights='int4' is not one of: none, fp16, int8",
    ),
    (lambda: WireSpec(grad_down="topk:2"), "wire.grad_down=topk:2 must say which fraction"),
    (
        lambda: RunSpec(
            wire=WireSpec(up="int4", down="int4", history_bytes=9),
            train=TrainSpec(mode="frozen_trunk"),
        ),
        "wire.history_bytes goes by the trunk's steps, and in train.mode=frozen_trunk",
    ),
    (lambda: WireSpec(call_deadline_s=0), "wire.call_deadline_s=0 must be greater than 0"),
    (lambda: WireSpec(call_deadline_s=9e9), "wire.call_deadline_s=9000000000.0 is too large; it"),
    (lambda: LaunchSpec(start_timeout_s=1e300), r"start_timeout_s=1e\+300 is too large"),
    (lambda: WireSpec(tls_cert="a"), "wire.tls_cert and wire.tls_key go together"),
    (lambda: WireSpec(bind="0.0.0.0:1", insecure=True), "set wire.advertise=host:port"),
    (lambda: WireSpec(bind="0.0.0.0:1"), "without encryption; set wire.tls_cert and wire.tls_key"),
    (lambda: LaunchSpec(kind="ray"), "launch.kind='ray' is not one of: inline, flwr"),
    (lambda: TrainSpec(rounds=0), "train.rounds=0 is too small"),
    (lambda: TrainSpec(lr=math.nan), "train.lr=nan must be greater than 0"),
    (lambda: TrainSpec(lr=math.inf), "train.lr=inf must be greater than 0"),
    (lambda: TrainSpec(beta1=1.0), "train.beta1=1.0 is out of range"),
    (lambda: TrainSpec(mode="half"), "train.mode='half' is not one of: joint, frozen_trunk, iso"),
    (lambda: TrainSpec(clip="value"), "train.clip='value' is not one of: global, parts"),
    (lambda: TrainSpec(label_smoothing=1), "train.label_smoothing=1 is out of range"),
    (lambda: TrainSpec(trunk_steps=2, mode="isolated"), "trunk_steps=2 trains the trunk, but in"),
    (lambda: TrainSpec(local_epochs=1), "a number of steps to end at, .* set train.max_steps"),
    (lambda: TrainSpec(evaluate_every=0), "train.evaluate_every=0 is too small"),
    (lambda: TrainSpec(save_every=-1), "train.save_every=-1 is too small"),
    (lambda: TrainSpec(optimizer="lion"), "train.optimizer='lion' is not one of: adamw"),
    (lambda: RunSpec(name="a b"), "name='a b' must be 1 to 64 of the characters"),
    (lambda: TrainSpec(local_epochs=1e308, max_steps=1), r"local_epochs=1e\+308 is too large"),
    (lambda: TrainSpec(rounds=10**400), r"train.rounds=10+ is too large; .* 9223372036854775807"),
    (lambda: TrainSpec(max_queue_delay_s=1e308), r"train.max_queue_delay_s=1e\+308 is too large"),
    (lambda: PolicySpec(deadline_s=1e308), r"policy.deadline_s=1e\+308 is too large"),
    (lambda: PolicySpec(round_deadline_s=1e308), "policy.round_deadline_s=.* is too large"),
    (lambda: GenerationSpec(ttl_s=1e308), r"generation.ttl_s=1e\+308 is too large"),
    (lambda: GenerationSpec(max_queue_delay_s=1e308), "generation.max_queue.* is too large"),
    (lambda: RunSpec(clients=0), "clients=0 is too small; it must be at least 1"),
    (lambda: RunSpec(seed=-1), "seed=-1 is too small"),
    (lambda: RunSpec(task="chat"), "task='chat' is not one of: causal_lm, sequence_classification"),
    (lambda: RunSpec(baseline="best"), "baseline='best' is not one of: none, central, fedavg"),
    (lambda: RunSpec(task="image_classification"), "does not go with data=embedded; images are"),
    (lambda: simulated(launch=LaunchSpec(workers=2)), "all 4 clients at work at once, but launch."),
    (lambda: simulated("client-7"), "names client-7, but the clients of this run are client-0 to"),
    (lambda: simulated(train=TrainSpec(mode="isolated")), "goes by the trunk's steps"),
    (lambda: simulated(baseline="fedavg"), "baseline=fedavg has no trunk"),
    (lambda: SweepSpec(variants={"a": ""}), "sweep.variants and sweep.seeds go together"),
    (lambda: SweepSpec(variants={"a b": ""}, seeds=[0]), "'a b' must be of A-Z a-z 0-9"),
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
        (dict(resume="auto"), True),
        (dict(wire=WireSpec(bind="127.0.0.1:9500", tls_ca="ca.pem")), True),
        (dict(wire=WireSpec(down="int8")), False),
        (dict(sweep=SweepSpec(variants={"a": "seed=1"}, seeds=[0])), True),
        (dict(seed=1), False),
        (dict(client_weights=ClientWeightsSpec(personal="top")), False),
        (dict(clients=5), False),
        (dict(split=SplitSpec(bottom=2)), False),
        (dict(model=ModelSpec(config={"n_layer": 3})), False),
        (dict(train=TrainSpec(lr=0.1)), False),
    ],
    ids=str,
)
def test_the_fingerprint_tells_runs_with_other_numbers_apart(change, same):
    assert (replace(RunSpec(), **change).fingerprint == RunSpec().fingerprint) is same


@pytest.mark.parametrize(
    ("policy", "num_clients", "enough"),
    [
        (PolicySpec(kind="sync", quorum=0.5), 5, 5),
        (PolicySpec(kind="async"), 5, 1),
        (PolicySpec(kind="async"), 0, 0),
        (PolicySpec(kind="quorum", quorum=0.5), 5, 3),
        (PolicySpec(kind="quorum", quorum=3), 5, 3),
        (PolicySpec(kind="quorum", quorum=9), 5, 5),
        (PolicySpec(kind="quorum", quorum=0.01), 5, 1),
    ],
)
def test_quorum(policy, num_clients, enough):
    assert policy.quorum_of(num_clients) == enough


@pytest.mark.parametrize(
    ("kind", "discounts"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("polynomial", [1.0, 2**-0.5, 9**-0.5]),
        ("hinge", [1.0, 1.0, 1 / (0.5 * 4 + 1)]),
    ],
)
def test_staleness_discount(kind, discounts):
    policy = PolicySpec(discount=kind, discount_a=0.5, discount_b=4)
    assert [policy.discount_of(staleness) for staleness in (0, 1, 8)] == pytest.approx(discounts)


@pytest.mark.parametrize(
    ("train", "taken", "steps"),
    [
        (TrainSpec(local_steps=7), 100, 7),
        (TrainSpec(local_steps=7, max_steps=10), 7, 3),
        (TrainSpec(local_steps=7, max_steps=10), 10, 0),
        (TrainSpec(local_epochs=2, batch_size=4, schedule="constant"), 0, 15),
        (TrainSpec(local_epochs=0.1, batch_size=50, schedule="constant"), 0, 1),
        (TrainSpec(local_epochs=1, accumulation=2, batch_size=5, max_steps=4), 2, 2),
    ],
)
def test_steps_in_a_round(train, taken, steps):
    assert train.steps_in_round(num_sequences=30, taken=taken) == steps


def test_settings_name_everything_that_decides_the_numbers():
    settings = RunSpec(policy=PolicySpec(sim_slowdown={"client-1": 2.0})).settings
    assert settings["train.lr"] == 0.003
    assert settings["policy.sim_slowdown.client-1"] == 2.0
    assert settings["sharding.options"] == {}
    assert not {"name", "resume", "launch.kind", "sweep.seeds"} & settings.keys()
