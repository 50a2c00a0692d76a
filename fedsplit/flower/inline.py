"""Runs a Flower ServerApp and its ClientApp in this process, without Ray, SuperLink or sockets.

Messages are copied in both directions, as if they had crossed a network, so the two apps behave
here as they do under `flwr run`.
"""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from threading import Lock
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
    ErrorCode,
)
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.errors import ConfigError, FedsplitError

log = logging.getLogger(__name__)


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    run_config: Mapping[str, str | int | float | bool],
    workers: int = 0,
) -> None:
    """Run both apps to the end of the server app, in this process.

    Every client has a `Context` of its own that lasts for the run, with `partition-id` and
    `num-partitions` in its `node_config` as in a Flower simulation. The function returns when all
    threads have ended, also after an exception; only an interrupt does not wait for clients.

    Args:
        server_app: Called once, in the calling thread; its exceptions reach the caller.
        client_app: Called once for each message, in a worker thread; an exception becomes a
            reply with an error, as under `flwr run`.
        num_clients: The number of nodes on the server app's grid.
        run_config: The `context.run_config` of both apps.
        workers: The number of clients that work at once; 0 for all.

    Raises:
        ConfigError: `num_clients` is below one, or `workers` is negative.
    """
    if num_clients < 1 or workers < 0:
        raise ConfigError(
            f"num_clients={num_clients} must be at least 1 and workers={workers} at least 0"
        )
    run_id = uuid4().int >> 66  # 62 bits: fits Flower's signed 64-bit fields
    _identify_this_process()
    nodes = _nodes(client_app, num_clients, run_id, run_config)
    pool = ThreadPoolExecutor(workers or num_clients, "fedsplit-client")
    try:
        server_app(InlineGrid(run_id, nodes, pool), _context(run_id, run_config))
    except BaseException as exc:
        # An interrupt ends the process without waiting for a client in the middle of a step.
        pool.shutdown(wait=isinstance(exc, Exception), cancel_futures=True)
        raise
    pool.shutdown()


def _identify_this_process() -> None:
    """Set the sender that Flower writes into a `Message(...)`; it is global to the process.

    All inline runs set the same values, so that concurrent runs do not disturb each other. The
    grid writes its own run's id into each message.
    """
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 0
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def _context(
    run_id: int,
    run_config: Mapping[str, str | int | float | bool],
    node_id: int = SUPERLINK_NODE_ID,
    node_config: UserConfig | None = None,
) -> Context:
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config=node_config or {},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def _nodes(
    client_app: ClientApp,
    num_clients: int,
    run_id: int,
    run_config: Mapping[str, str | int | float | bool],
) -> dict[int, "_Node"]:
    nodes = {}
    for partition in range(num_clients):
        node_id = SUPERLINK_NODE_ID + 1 + partition
        # The client works in the process of the user who wrote the run.
        config: UserConfig = {
            PARTITION_ID_KEY: partition,
            NUM_PARTITIONS_KEY: num_clients,
            "trust-runs": True,
        }
        nodes[node_id] = _Node(client_app, _context(run_id, run_config, node_id, config))
    return nodes


class _Node:
    """One client: its app, and its state between messages."""

    def __init__(self, client_app: ClientApp, context: Context) -> None:
        self._client_app = client_app
        self._context = context
        # A Flower node handles one message at a time.
        self._message_lock = Lock()

    def answer(self, message: Message) -> Message:
        """Run the app on a message; a failed call leaves the context unchanged."""
        with self._message_lock:
            # The app changes its context in place, and a failed call must leave no trace.
            context = deepcopy(self._context)
            try:
                reply = deepcopy(self._client_app(message, context))
            except Exception as exc:  # foreign code: Flower replies with an error
                # The text of a FedsplitError is enough; any other error needs its traceback.
                if not isinstance(exc, FedsplitError):
                    log.exception("ClientApp of node %d failed", context.node_id)
                return _refusal(
                    message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(exc).__name__}: {exc}"
                )
            self._context = context
            return reply


def _refusal(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)


class InlineGrid(Grid):
    """Flower's grid over nodes that live in this process.

    Args:
        run_id: Identifies the run in every message.
        nodes: The nodes by their id.
        pool: The threads that run the nodes' apps.
    """

    def __init__(self, run_id: int, nodes: Mapping[int, _Node], pool: ThreadPoolExecutor) -> None:
        self._run = Run.create_empty(run_id)
        self._nodes = nodes
        self._pool = pool
        self._replies: dict[str, Future[Message]] = {}

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, of which only the id is set."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node; in new code Flower prefers `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, ordered by partition."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message to its node, and return the ids to pull the replies with."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that have arrived; each reply is returned once."""
        done = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(i).result() for i in done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages, and return the replies that arrive within `timeout` seconds (None: all).

        Replies are in the order of their messages. A late reply can be pulled later.
        """
        message_ids = self.push_messages(messages)
        wait([self._replies[i] for i in message_ids], timeout)
        return self.pull_messages(message_ids)

    def _push(self, message: Message) -> str:
        message = deepcopy(message)
        message_id = str(uuid4())
        # Flower's metadata has no setter for the fields that its SuperLink sets.
        vars(message.metadata).update(_run_id=self._run.run_id, _message_id=message_id)
        self._replies[message_id] = self._pool.submit(self._answer, message)
        return message_id

    def _answer(self, message: Message) -> Message:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            reason = (
                f"node {message.metadata.dst_node_id} does not exist; send to one of "
                f"{list(self._nodes)}"
            )
            reply = _refusal(message, ErrorCode.NODE_UNAVAILABLE, reason)
        else:
            reply = node.answer(message)
        vars(reply.metadata).update(_message_id=str(uuid4()))
        return reply
