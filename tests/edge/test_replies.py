"""Replies through Flower that are hostile: refused, and without effect on anybody else."""

import math
import threading
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import grpc
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsplit.errors import BadTensor, DeadlineExceeded, ModelMismatch, NonFinite, ProtocolError
from fedsplit.flower import client_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.records import ARRAYS, METRICS, TOLD_NOTHING, WEIGHT
from fedsplit.flower.reply import evaluation_content, identity_of, training_content
from fedsplit.flower.strategy.invitations import Invitations
from fedsplit.flower.strategy.nodes import GridView, NodeRegistry
from fedsplit.flower.strategy.tracker import MessageTracker
from fedsplit.trunk.work_counts import WorkCount
from tests.edge.federation import client_that, federate, joined, spec_for

SENT = ArrayRecord({"w": torch.ones(2, 3), "b": torch.zeros(3)})
TRAINED = {
    WEIGHT: 30,
    "loss": 2.5,
    "steps": 2,
    "repeated": 0,
    "refused": 0,
    "skipped": 0,
    "own-data": 0,
    "seconds": 1.5,
    "peak-bytes": 1000,
    "done": 0,
    "bytes-up": 10,
    "bytes-down": 20,
    **TOLD_NOTHING,
}
EVALUATED = {
    WEIGHT: 30,
    "loss": 2.5,
    "bits-per-byte": 1.5,
    "nats": 75.0,
    "bytes": 70,
    "correct": 0,
    "bytes-up": 10,
    "bytes-down": 20,
    **TOLD_NOTHING,
}
WORK = WorkCount(steps=2, tokens=30, positions=40)


def array(data, *, dtype="float32", shape=(2, 3), stype="numpy.ndarray"):
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def reply_with(numbers=None, arrays=None, **records):
    """A client's honest reply to training, with these numbers, arrays and records changed."""
    content = RecordDict({METRICS: MetricRecord({**TRAINED, **(numbers or {})})})
    content[ARRAYS] = ArrayRecord({**SENT, **(arrays or {})})
    for name, record in records.items():
        content[name] = record
    return content


def without(content, record, name):
    del content[record][name]
    return content


def check(content, *, sent=SENT, codec="none", work=WORK, is_stepped=True):
    return training_content(
        content, sent=sent, codec=codec, work=work, is_stepped=is_stepped, client="client-1"
    )


# --- the function -----------------------------------------------------------------------------


def test_an_honest_reply_passes_as_it_is():
    trained = {"w": Array(np.full((2, 3), 900, np.float32)), "b": Array(np.ones(3, np.float32))}
    checked = check(reply_with(arrays=trained))
    assert list(checked) == [METRICS, ARRAYS]
    assert dict(checked[METRICS]) == TRAINED
    assert list(checked[ARRAYS]) == ["w", "b"]
    for name, value in trained.items():
        np.testing.assert_array_equal(checked[ARRAYS][name].numpy(), value.numpy())


def test_the_order_and_layout_of_a_peer_do_not_reach_the_average():
    transposed = Array(np.arange(6, dtype=np.float32).reshape(3, 2).T)
    content = RecordDict({ARRAYS: ArrayRecord({"b": SENT["b"], "w": transposed})})
    content[METRICS] = MetricRecord(dict(reversed(TRAINED.items())))
    checked = check(content)
    assert list(checked[ARRAYS]) == ["w", "b"]
    assert list(checked[METRICS]) == list(check(reply_with())[METRICS])
    assert checked[ARRAYS]["w"].data == Array(np.ascontiguousarray(transposed.numpy())).data


@dataclass(frozen=True)
class Refused:
    content: RecordDict
    error: type[Exception]
    text: str


HUGE = Array(np.full((2, 3), 1e38, np.float32))
REFUSED = {
    "values of 1e38": Refused(reply_with(arrays={"w": HUGE}), BadTensor, "a value of 1e.38 in w"),
    "nan": Refused(
        reply_with(arrays={"w": Array(np.full((2, 3), math.nan, np.float32))}),
        NonFinite,
        "NaN or Inf in w",
    ),
    "no file of NumPy": Refused(
        reply_with(arrays={"w": array(b"junk")}), BadTensor, "are not its .npy file"
    ),
    "objects": Refused(
        reply_with(arrays={"w": array(b"\x80\x04.", dtype="object")}), ModelMismatch, "w as object"
    ),
    "a shape of 10^9": Refused(
        reply_with(arrays={"w": array(SENT["w"].data, shape=(10**9,))}), ModelMismatch, "1000000000"
    ),
    "a header of another shape": Refused(
        reply_with(arrays={"w": array(Array(np.zeros((10, 3), np.float32)).data)}),
        BadTensor,
        "are not its .npy file",
    ),
    "wider": Refused(
        reply_with(arrays={"w": Array(np.full((2, 3), 1e300))}), ModelMismatch, "w as float64"
    ),
    "too many arrays": Refused(
        reply_with(arrays={f"x{n}": SENT["b"] for n in range(1000)}),
        ModelMismatch,
        "1002 arrays, not the 2 that were sent",
    ),
    "too few arrays": Refused(
        without(reply_with(), ARRAYS, "b"), ModelMismatch, "1 arrays, not the 2"
    ),
    "no arrays": Refused(
        RecordDict({METRICS: MetricRecord(dict(TRAINED))}), ProtocolError, "difference is 'arrays'"
    ),
    "no metrics": Refused(
        RecordDict({ARRAYS: SENT}), ProtocolError, "first difference is 'metrics'"
    ),
    "records of other types": Refused(
        RecordDict({ARRAYS: ConfigRecord(), METRICS: SENT}), ProtocolError, "of other types"
    ),
    "a further record": Refused(
        reply_with(more=ConfigRecord({"text": "x" * 10**6})), ProtocolError, "difference is 'more'"
    ),
    "a further number": Refused(
        reply_with({"more": 1}), ProtocolError, "has 17 numbers, not 16; the first difference is 'm"
    ),
    "a missing number": Refused(
        without(reply_with(), METRICS, "loss"), ProtocolError, "the first difference is 'loss'"
    ),
    "a list": Refused(reply_with({"loss": [2.5] * 1000}), ProtocolError, "a list as loss"),
    "tokens nan": Refused(reply_with({WEIGHT: math.nan}), ProtocolError, "nan as num-examples"),
    "half a token": Refused(reply_with({WEIGHT: 1.5}), ProtocolError, "must be a whole number"),
    "tokens below 0": Refused(reply_with({WEIGHT: -(10**9)}), ProtocolError, "-1000000000 as num"),
    "tokens 1e15": Refused(reply_with({WEIGHT: 10**15}), ProtocolError, "at most 30 is possible"),
    "steps": Refused(reply_with({"steps": 3}), ProtocolError, "steps=3, but .* at most 2 is"),
    "loss nan": Refused(reply_with({"loss": math.nan}), ProtocolError, "nan as loss"),
    "loss 1e300": Refused(reply_with({"loss": 1e300}), ProtocolError, r"1e\+300 as loss"),
    "loss 1e5": Refused(reply_with({"loss": 1e5}), ProtocolError, "loss=100000.0, but"),
    "bytes": Refused(reply_with({"bytes-up": 2**62}), ProtocolError, "as bytes-up"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_reply_that_cannot_be_is_refused(case):
    with pytest.raises(case.error, match=case.text):
        check(case.content)


def test_decompressed_weights_are_checked_as_well():
    sent = ArrayRecord({"w": torch.ones(2, 4)})
    rows = np.frombuffer(np.full((2, 4), 6e4, np.float16).tobytes(), np.uint8).reshape(2, 8)
    content = reply_with()
    content[ARRAYS] = ArrayRecord({"w": Array(rows.copy())})
    with pytest.raises(BadTensor, match="a value of 6e.04 in w"):
        check(content, sent=sent, codec="fp16")


def test_the_trunk_count_is_the_weight_where_the_trunk_steps():
    assert check(reply_with({WEIGHT: 1}))[METRICS][WEIGHT] == 30


def test_positions_bound_the_weight_where_the_trunk_does_not_step():
    unstepped = WorkCount(positions=40)
    few = check(reply_with({WEIGHT: 25}), work=unstepped, is_stepped=False)
    assert few[METRICS][WEIGHT] == 25
    with pytest.raises(ProtocolError, match="num-examples=41, but .* at most 40 is possible"):
        check(reply_with({WEIGHT: 41}), work=unstepped, is_stepped=False)


def test_a_reply_without_client_weights_has_no_record_for_them():
    content = RecordDict({METRICS: MetricRecord(dict(TRAINED))})
    assert list(check(content, sent=ArrayRecord())) == [METRICS]
    with pytest.raises(ProtocolError, match="2 records, not 1"):
        check(reply_with(), sent=ArrayRecord())


REFUSED_EVALUATIONS = {
    "no metrics": (RecordDict(), "0 records, not 1"),
    "a further record": (RecordDict({METRICS: MetricRecord(), "x": ConfigRecord()}), "2 records"),
    "no numbers": (RecordDict({METRICS: MetricRecord()}), "has 0 numbers, not 12"),
    "arrays": (RecordDict({METRICS: SENT}), "records of other types"),
    **{
        f"{name}={value}": (RecordDict({METRICS: MetricRecord({**EVALUATED, name: value})}), text)
        for name, value, text in [
            (WEIGHT, 10**15, "at most 40 is possible"),
            (WEIGHT, -1, "-1 as num-examples"),
            ("nats", math.nan, "nan as nats"),
            ("nats", 1e300, "as nats, which must be"),
            ("nats", 1e6, "nats=1000000.0, but"),
            ("bytes", 10**9, "bytes=1000000000, but"),
            ("correct", 31, "correct=31, but .* at most 30"),
        ]
    },
}


@pytest.mark.parametrize(("content", "text"), REFUSED_EVALUATIONS.values(), ids=REFUSED_EVALUATIONS)
def test_an_evaluation_that_cannot_be_is_refused(content, text):
    with pytest.raises(ProtocolError, match=text):
        evaluation_content(content, work=WORK)


# --- the first reply --------------------------------------------------------------------------

HELLOS = {
    "nothing": (RecordDict(), "no text 'client' and 'config'"),
    "other types": (RecordDict({"hello": SENT}), "no text 'client' and 'config'"),
    "numbers": (
        RecordDict({"hello": ConfigRecord({"client": 1, "config": 2})}),
        "no text 'client' and 'config'",
    ),
    "a name of 1 MB": (
        RecordDict({"hello": ConfigRecord({"client": "\x1b[2J" * 2**18, "config": ""})}),
        r"the name '(\[2J ?)+'?",
    ),
}


@pytest.mark.parametrize(("content", "text"), HELLOS.values(), ids=HELLOS)
def test_a_first_reply_that_is_none_is_refused(content, text):
    with pytest.raises(ProtocolError, match=text) as refusal:
        identity_of(content, {"client-0"})
    assert len(str(refusal.value)) < 1000 and str(refusal.value).isprintable()


HOSTILE = 0


def register(run, answer, step, answers_after=None):
    """Register three nodes, of which the first one answers with `answer`, after an event."""
    client, server = ClientApp(), ServerApp()

    @client.query("hello")
    def hello(message, context):
        number = int(context.node_config["partition-id"])
        honest = {"client": f"client-{number - 1}", "config": run.fingerprint}
        if number == HOSTILE and answers_after:
            answers_after.wait(timeout=60)
        content = answer if number == HOSTILE else RecordDict({"hello": ConfigRecord(honest)})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid, context):
        nodes = list(grid.get_node_ids())
        view = GridView(grid, lambda: nodes, 60.0)
        step(NodeRegistry(view, run, Invitations(run, tokenizer="", labels=())), nodes)

    run_inline(server, client, num_clients=3, run_config={})


def hello_of(run, name):
    return RecordDict({"hello": ConfigRecord({"client": name, "config": run.fingerprint})})


@pytest.mark.parametrize("case", HELLOS)
def test_a_node_with_a_bad_first_reply_is_left_out(tmp_path, case):
    def step(registry, nodes):
        registry.register_all()
        assert registry.present() == {"client-0": nodes[1], "client-1": nodes[2]}

    register(spec_for(tmp_path, "clients=2"), HELLOS[case][0], step)


def test_a_node_cannot_take_the_name_of_one_that_is_connected(tmp_path):
    def step(registry, nodes):
        first, *others = nodes
        nodes[:] = others
        registry.register_all()
        nodes[:] = [first, *others]
        while not registry.name_of(first):
            registry.present()
        assert registry.present() == {"client-0": others[0], "client-1": others[1]}
        nodes[:] = [first, others[0]]
        assert registry.present() == {"client-0": others[0], "client-1": first}

    run = spec_for(tmp_path, "clients=2")
    register(run, hello_of(run, "client-1"), step)


def test_a_new_node_that_does_not_answer_holds_up_nobody(tmp_path):
    released = threading.Event()

    def step(registry, nodes):
        first, *others = nodes
        nodes[:] = others
        registry.register_all()
        nodes[:] = [first, *others]
        assert registry.present() == {"client-0": others[0], "client-1": others[1]}
        assert not released.is_set()
        released.set()

    run = spec_for(tmp_path, "clients=2")
    register(run, hello_of(run, "client-1"), step, answers_after=released)


def test_without_a_node_the_error_says_to_start_them_again_after_the_superlink(tmp_path):
    def step(registry, nodes):
        nodes.clear()
        told = (
            "start 2 more, or lower clients. A SuperNode ends when its SuperLink is started again"
        )
        with pytest.raises(DeadlineExceeded, match=told):
            registry.register_all()

    register(spec_for(tmp_path, "clients=2", "launch.start_timeout_s=0.1"), RecordDict(), step)


def test_a_failing_superlink_is_no_failure_of_its_clients():
    class Stopped(GridView):
        def pull_messages(self, message_ids):
            raise grpc.RpcError("the SuperLink has stopped the run")

    server = ServerApp()

    @server.main()
    def main(grid, context):
        tracker = MessageTracker(Stopped(grid, grid.get_node_ids, 60.0))
        node, *_ = grid.get_node_ids()
        asked = Message(RecordDict(), dst_node_id=node, message_type="query.hello")
        tracker.collect(tracker.send([asked]))

    with pytest.raises(grpc.RpcError, match="the SuperLink has stopped the run"):
        run_inline(server, ClientApp(), num_clients=1, run_config={})


def test_a_reply_that_flower_cannot_decode_takes_no_other_one_with_it(tmp_path):
    class Decoding(GridView):
        """A grid that decodes all replies of a call, as Flower's does, or fails at one of them."""

        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            for reply in found:
                MetricRecord.inflate(reply.content["hello"]["object"])
            return found

    client, server = ClientApp(), ServerApp()

    @client.query("hello")
    def hello(message, context):
        is_hostile = context.node_config["partition-id"] == HOSTILE
        body = MetricRecord({"x": 1}).deflate()
        if is_hostile:
            body = body[:-3] + b"\xff" * 3
        return Message(RecordDict({"hello": ConfigRecord({"object": body})}), reply_to=message)

    @server.main()
    def main(grid, context):
        tracker = MessageTracker(Decoding(grid, grid.get_node_ids, 60.0))
        asked = [
            Message(RecordDict(), dst_node_id=node, message_type="query.hello")
            for node in grid.get_node_ids()
        ]
        ids, replies = tracker.send(asked), {}
        while tracker.busy_nodes():
            replies |= tracker.collect(ids)
        assert [replies[i].has_error() for i in ids] == [True, False, False]
        assert "Flower could not read its reply (DecodeError: " in replies[ids[0]].error.reason

    run_inline(server, client, num_clients=3, run_config={})


def test_a_reply_counts_once_and_only_for_its_message(tmp_path):
    class Repeating(GridView):
        """A grid that returns every reply again with each later one."""

        seen: ClassVar[list[Message]] = []

        def pull_messages(self, message_ids):
            self.seen += super().pull_messages(message_ids)
            return [*self.seen, *self.seen]

    client, server = ClientApp(), ServerApp()

    @client.query("hello")
    def hello(message, context):
        return Message(RecordDict(), reply_to=message)

    @server.main()
    def main(grid, context):
        tracker = MessageTracker(Repeating(grid, grid.get_node_ids, 60.0))
        for _ in range(2):
            ids = tracker.send(
                [
                    Message(RecordDict(), dst_node_id=node, message_type="query.hello")
                    for node in grid.get_node_ids()
                ]
            )
            replies = []
            while tracker.busy_nodes():
                replies += tracker.collect(ids)
            assert sorted(replies) == sorted(ids)

    run_inline(server, client, num_clients=2, run_config={})


# --- a run with one hostile client --------------------------------------------------------------


def with_array(content, array_of):
    """The content with one of its arrays changed."""
    name, old = next(iter(content[ARRAYS].items()))
    content[ARRAYS][name] = array_of(old)


def with_numbers(content, **numbers):
    for name, value in numbers.items():
        content[METRICS][name.replace("_", "-")] = value


def everything_zero(content):
    zeros = {name: Array(np.zeros_like(old.numpy())) for name, old in content[ARRAYS].items()}
    content[ARRAYS] = ArrayRecord(zeros)
    with_numbers(content, num_examples=10**15)


TRAINING_ATTACKS = {
    "1e38": lambda c: with_array(c, lambda a: Array(np.full(a.shape, 1e38, a.dtype))),
    "objects": lambda c: with_array(c, lambda a: array(b"", dtype="object", shape=a.shape)),
    "zeros of weight 1e15": everything_zero,
    "weight nan": lambda c: with_numbers(c, num_examples=math.nan),
    "no metrics": lambda c: c.pop(METRICS),
    "times 50": lambda c: with_array(c, lambda a: Array(50 * a.numpy())),
}
EVALUATION_ATTACKS = {
    "no metrics": lambda c: c.pop(METRICS),
    "nan": lambda c: with_numbers(c, nats=math.nan),
    "weight 1e15": lambda c: with_numbers(c, num_examples=10**15),
    "negative weight": lambda c: with_numbers(c, num_examples=-(10**9)),
    "1e300": lambda c: with_numbers(c, nats=1e300),
}


def client_with(in_training, in_evaluation):
    """A client app whose first client treats its reply of each round so before it sends it."""
    app = ClientApp()
    app.query("hello")(client_app.hello)

    def reply_of(message, context, work, treat):
        if int(context.node_config["partition-id"]) != HOSTILE:
            return work(message, context)
        # Its state stays as it is, as that of a client whose work fails.
        reply = work(message, deepcopy(context))
        treat(reply, int(message.content["fedsplit"]["round"]) - 1)
        return reply

    @app.train()
    def train(message, context):
        return reply_of(message, context, client_app.train, in_training)

    @app.evaluate()
    def evaluate(message, context):
        return reply_of(message, context, client_app.evaluate, in_evaluation)

    return app


def fail(reply, number):
    raise OSError("disk full")


@pytest.mark.slow
def test_a_hostile_reply_costs_its_sender_the_round_and_changes_nothing_else(tmp_path):
    in_training, in_evaluation = list(TRAINING_ATTACKS.values()), list(EVALUATION_ATTACKS.values())
    words = [f"train.rounds={len(in_training)}", "clients=2", "train.warmup_steps=2"]
    # The guard compares with the changes of the honest client, from the last attack on.
    words.append("guard.after=5")

    def attack_training(reply, number):
        in_training[number](reply.content)

    def attack_evaluation(reply, number):
        in_evaluation[number % len(in_evaluation)](reply.content)

    hostile = federate(
        spec_for(tmp_path / "hostile", *words), client_with(attack_training, attack_evaluation)
    )
    failing = federate(spec_for(tmp_path / "failing", *words), client_with(fail, fail))
    rounds = hostile.rounds()
    assert [(stats.clients, stats.failed, stats.refused_replies) for stats in rounds] == [
        (1, 1, 2)
    ] * len(in_training)
    assert "1 failed, 2 refused" in rounds[0].line
    assert [stats.eval_loss for stats in rounds] == [s.eval_loss for s in failing.rounds()]
    one, other = joined(hostile), joined(failing)
    assert all(one[name].equal(other[name]) for name in one)


def test_the_trunk_counts_the_tokens_that_weigh_a_client(tmp_path):
    said = []

    def train(message, context, go_on):
        reply = go_on()
        said.append(reply.content[METRICS][WEIGHT])
        with_numbers(reply.content, num_examples=1)
        return reply

    (stats,) = federate(spec_for(tmp_path, "clients=2"), client_that(train=train)).rounds()
    assert stats.tokens == sum(said) > 2


def test_a_round_whose_only_client_is_hostile_does_not_end_the_run(tmp_path):
    """One client of three is chosen a round: it is hostile in the first one, whoever it is."""

    def train(message, context, go_on):
        reply = go_on()
        if message.content["fedsplit"]["round"] == 1:
            reply.content.pop(METRICS)
        return reply

    one_of_three = ["client_weights.options.fraction_train=0.34", "train.rounds=2"]
    rounds = federate(spec_for(tmp_path, *one_of_three), client_that(train=train)).rounds()
    assert [(stats.clients, stats.failed) for stats in rounds] == [(0, 1), (1, 0)]
    assert math.isnan(rounds[0].loss) and math.isfinite(rounds[0].eval_loss)
