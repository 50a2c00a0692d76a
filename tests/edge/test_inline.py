"""The in-process grid: both apps run on it as they do under Flower, and nothing is left behind."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian, Result, Strategy

from fedsplit.errors import ConfigError
from fedsplit.flower.inline import run_inline


def server_of(main: Callable[[Grid, Context], None]) -> ServerApp:
    app = ServerApp()
    app.main()(main)
    return app


def client_of(answer: Callable[[Message, Context], RecordDict]) -> ClientApp:
    app = ClientApp()
    for kind in (app.train, app.evaluate, app.query):
        kind()(lambda message, context: Message(answer(message, context), reply_to=message))
    return app


def ask(grid: Grid, nodes: list[int], content: RecordDict | None = None) -> list[Message]:
    record = content or RecordDict()
    return [Message(record, dst_node_id=node, message_type="query") for node in nodes]


def metrics(**values: Any) -> RecordDict:
    return RecordDict(
        {"metrics": MetricRecord({k.replace("_", "-"): v for k, v in values.items()})}
    )


def one_query(client: ClientApp, **options: Any) -> list[Message]:
    replies: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        replies.extend(grid.send_and_receive(ask(grid, list(grid.get_node_ids()))))

    run_inline(server_of(main), client, **{"num_clients": 4, "run_config": {}} | options)
    return replies


def add_partition(message: Message, context: Context) -> RecordDict:
    """A client whose weights move by partition + 1, weighted by partition + 1."""
    if message.metadata.message_type == "evaluate":
        return metrics(num_examples=1, seen=float(context.node_config["partition-id"]))
    by = int(context.node_config["partition-id"]) + 1
    weights = message.content["arrays"]["w"].numpy() + by
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": by, "step": float(by)}),
        }
    )


def train(strategy: Strategy) -> Result:
    results: list[Result] = []

    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord({"w": Array(np.zeros(3))})
        results.append(strategy.start(grid, start, num_rounds=3, timeout=60))

    run_inline(server_of(main), client_of(add_partition), num_clients=4, run_config={})
    return results[0]


@pytest.mark.parametrize(
    ("strategy", "moved"),
    [(FedAvg, 3.0), (FedMedian, 2.5)],
    ids=["fedavg: weighted mean of 1 2 3 4 is 3", "fedmedian: pops from the replies"],
)
def test_flowers_own_strategies_run(strategy: type[Strategy], moved: float) -> None:
    result = train(strategy())
    np.testing.assert_allclose(result.arrays["w"].numpy(), 3 * moved)
    assert (
        set(result.train_metrics_clientapp) == set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    )
    assert result.evaluate_metrics_clientapp[3]["seen"] == 1.5


def test_two_runs_in_two_threads_do_not_disturb_each_other() -> None:
    def run(seed: int) -> tuple[set[int], int]:
        seen: list[int] = []

        def main(grid: Grid, context: Context) -> None:
            for _ in range(20):
                messages = ask(grid, list(grid.get_node_ids()))
                seen.extend(m.metadata.run_id for m in grid.send_and_receive(messages))
            seen.append(context.run_id)

        client = client_of(lambda message, context: metrics(x=message.metadata.run_id % 7))
        run_inline(server_of(main), client, num_clients=3, run_config={})
        return set(seen), len(seen)

    with ThreadPoolExecutor(2) as pool:
        (first, first_count), (second, second_count) = pool.map(run, range(2))
    assert len(first) == len(second) == 1
    assert first != second
    assert first_count == second_count == 61


def test_training_in_two_threads_at_once_gives_the_same() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train, [FedAvg(), FedAvg()]))
    for result in results:
        np.testing.assert_allclose(result.arrays["w"].numpy(), 9.0)


def test_a_node_has_its_partition_and_the_run_config() -> None:
    def answer(message: Message, context: Context) -> RecordDict:
        return RecordDict({"c": ConfigRecord({**context.node_config, **context.run_config})})

    replies = one_query(client_of(answer), run_config={"config": "a: 1\nb: '\"'\n", "n": 3})
    assert [dict(reply.content["c"]) for reply in replies] == [
        {
            "partition-id": i,
            "num-partitions": 4,
            "trust-runs": True,
            "config": "a: 1\nb: '\"'\n",
            "n": 3,
        }
        for i in range(4)
    ]
    assert len({reply.metadata.src_node_id for reply in replies}) == 4


def count_calls(message: Message, context: Context) -> RecordDict:
    """A client that counts its messages in its state and fails on the second."""
    state = context.state.get("count", MetricRecord({"calls": 0}))
    context.state["count"] = state
    state["calls"] += 1
    if message.content:
        raise ValueError("asked to fail")
    return RecordDict({"count": state})


def test_state_lasts_and_a_failed_call_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []
    errors: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        node = list(grid.get_node_ids())[:1]
        for fail in (False, True, False):
            content = metrics(fail=1) if fail else None
            (reply,) = grid.send_and_receive(ask(grid, node, content))
            if reply.has_error():
                errors.append(reply)
            else:
                calls.append(reply.content["count"]["calls"])

    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        run_inline(server_of(main), client_of(count_calls), num_clients=2, run_config={})
    finally:
        logger.removeHandler(caplog.handler)
    assert calls == [1, 2]
    assert [(e.error.code, e.error.reason) for e in errors] == [(2, "ValueError: asked to fail")]
    assert errors[0].metadata.src_node_id == 2
    assert "Traceback" in caplog.text and "asked to fail" in caplog.text


def test_what_one_client_does_to_a_message_no_other_sees() -> None:
    def answer(message: Message, context: Context) -> RecordDict:
        message.content["metrics"]["x"] += 1
        return message.content

    seen: list[Any] = []

    def main(grid: Grid, context: Context) -> None:
        content = metrics(x=0)
        replies = grid.send_and_receive(ask(grid, list(grid.get_node_ids()), content))
        seen.extend(reply.content["metrics"]["x"] for reply in replies)
        seen.append(content["metrics"]["x"])

    run_inline(server_of(main), client_of(answer), num_clients=3, run_config={})
    assert seen == [1, 1, 1, 0]


def test_all_clients_are_live_at_once() -> None:
    barrier = threading.Barrier(6)

    def answer(message: Message, context: Context) -> RecordDict:
        barrier.wait(timeout=30)
        return RecordDict()

    assert not any(reply.has_error() for reply in one_query(client_of(answer), num_clients=6))


def test_no_more_clients_are_live_than_workers() -> None:
    live: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def answer(message: Message, context: Context) -> RecordDict:
        with lock:
            live.append(1)
            most.append(len(live))
        time.sleep(0.01)
        with lock:
            live.pop()
        return RecordDict()

    assert len(one_query(client_of(answer), num_clients=5, workers=2)) == 5
    assert max(most) <= 2


def test_a_late_reply_is_left_out_and_can_be_pulled() -> None:
    go = threading.Event()

    def answer(message: Message, context: Context) -> RecordDict:
        if context.node_config["partition-id"] == 1:
            go.wait(timeout=30)
        return RecordDict()

    in_time: list[int] = []
    late: list[int] = []

    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        grid.send_and_receive(ask(grid, nodes[:1]))  # node 0 is up
        replies = grid.send_and_receive(ask(grid, nodes), timeout=0.5)
        in_time.extend(reply.metadata.src_node_id for reply in replies)
        ids = list(grid.push_messages(ask(grid, nodes[1:])))
        assert list(grid.pull_messages(ids)) == []
        go.set()
        while not late:
            late.extend(reply.metadata.src_node_id for reply in grid.pull_messages(ids))
            time.sleep(0.005)
        assert list(grid.pull_messages(ids)) == []

    run_inline(server_of(main), client_of(answer), num_clients=2, run_config={})
    assert (in_time, late) == ([2], [3])


def test_a_message_to_nobody_is_answered_with_an_error() -> None:
    replies: list[Message] = []

    def main(grid: Grid, context: Context) -> None:
        replies.extend(grid.send_and_receive(ask(grid, [99])))

    run_inline(server_of(main), client_of(add_partition), num_clients=2, run_config={})
    assert replies[0].error.reason == "node 99 does not exist; send to one of [2, 3]"


def test_a_failing_server_app_reaches_the_caller_and_no_thread_stays() -> None:
    before = set(threading.enumerate())

    def main(grid: Grid, context: Context) -> None:
        grid.push_messages(ask(grid, list(grid.get_node_ids())))
        raise LookupError("the server app broke")

    slow = client_of(lambda message, context: time.sleep(0.02) or RecordDict())
    with pytest.raises(LookupError, match="the server app broke"):
        run_inline(server_of(main), slow, num_clients=4, run_config={}, workers=1)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("wrong", [{"num_clients": 0}, {"workers": -1}], ids=str)
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1 and workers=.* at least 0"):
        one_query(client_of(add_partition), **wrong)
