"""Messages that were sent through a grid, and their replies as they arrive."""

import time
from collections.abc import Callable, Iterable, Sequence, Set

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedsplit.transport.status import is_rpc_error

_PAUSE_S = (0.005, 0.1)
"""The pause between two polls of a grid: the first one, and the longest while nothing arrives."""


class MessageTracker:
    """The messages that were sent through a grid and are not answered yet.

    Args:
        grid: Flower's grid.
        replaced: Returns the nodes that will never answer, because their SuperNode was started
            again as another node. Flower itself notices this after a minute.
    """

    def __init__(self, grid: Grid, replaced: Callable[[], Set[int]] = frozenset) -> None:
        self._grid = grid
        self._replaced = replaced
        self._out: dict[str, Message] = {}
        self._lost: dict[str, Message] = {}
        self._given_up: set[str] = set()
        self._pause_s = _PAUSE_S[0]

    def busy_nodes(self) -> set[int]:
        """Return the nodes that have not answered their last message.

        A node handles one message at a time.
        """
        # A late reply to a message that was given up shows that its node is free again.
        if self._given_up:
            self._given_up -= self.collect(self._given_up).keys()
        return {message.metadata.dst_node_id for message in self._out.values()}

    def give_up(self, ids: Iterable[str]) -> None:
        """Mark messages whose replies are not needed any more."""
        self._given_up |= set(ids)

    def send(self, messages: Sequence[Message]) -> list[str]:
        """Push messages, and return the ids to collect their replies with.

        A message that Flower does not take is answered by an error.
        """
        pushed = list(self._grid.push_messages(messages)) if messages else []
        ids = [
            # Flower returns no id for a malformed message, and no list at all for too large ones.
            (pushed[i] if i < len(pushed) else "") or f"not taken {id(message)}"
            for i, message in enumerate(messages)
        ]
        self._out.update(zip(ids, messages, strict=True))
        self._lost.update({i: m for i, m in zip(ids, messages, strict=True) if i not in pushed})
        return ids

    def collect(self, ids: Iterable[str]) -> dict[str, Message]:
        """Return the replies to these messages that have arrived; each reply is returned once.

        If there are none, the call pauses, and each further pause without a reply is longer.
        """
        waiting = [i for i in ids if i in self._out]
        replies = {i: reply for i in waiting for reply in self._pull(i)}
        replaced = self._replaced() if waiting and not replies else frozenset()
        for i in waiting:
            if self._out[i].metadata.dst_node_id in replaced:
                code = ErrorCode.NODE_UNAVAILABLE
                replies[i] = _failed(self._out[i], "its SuperNode was started again", code)
        for i in replies:
            del self._out[i]
        if replies or not waiting:
            self._pause_s = _PAUSE_S[0]
        else:
            # The pauses grow, so that a long round does not keep the SuperLink busy with polls.
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])
        return replies

    def _pull(self, message_id: str) -> list[Message]:
        """Return the reply to a message, if it has arrived; at most one."""
        message = self._out[message_id]
        if message_id in self._lost:
            del self._lost[message_id]
            return [_failed(message, "Flower did not take it; the SuperLink's log says why")]
        # One at a time: a grid decodes all replies of a call, and one that cannot be decoded would
        # take the others with it.
        try:
            found = list(self._grid.pull_messages([message_id]))
        except Exception as exc:  # foreign code, which decodes what a peer sent
            if is_rpc_error(exc):  # the SuperLink failed, and not the sender of this reply
                raise
            reason = f"Flower could not read its reply ({type(exc).__name__}: {exc})"
            return [_failed(message, reason)]
        # Only the first reply counts, and only one to this message.
        return [each for each in found if each.metadata.reply_to_message_id == message_id][:1]


def _failed(message: Message, reason: str, code: int = ErrorCode.MESSAGE_UNAVAILABLE) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)
