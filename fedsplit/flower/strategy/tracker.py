"""Messages that were sent through a grid, and their replies as they arrive."""

import time
from collections.abc import Iterable, Sequence

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

_PAUSE_S = (0.005, 0.1)
"""The pause between two polls of a grid: the first one, and the longest while nothing arrives."""


class MessageTracker:
    """The messages that were sent through a grid and are not answered yet.

    Args:
        grid: Flower's grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
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
        waiting = {i for i in ids if i in self._out}
        replies = {i: _not_taken(self._lost.pop(i)) for i in waiting & self._lost.keys()}
        for reply in self._grid.pull_messages(waiting - replies.keys()) if waiting else ():
            # Only the first reply counts, and only one that was asked for.
            if (i := reply.metadata.reply_to_message_id) in waiting:
                replies.setdefault(i, reply)
        for i in replies:
            del self._out[i]
        if replies or not waiting:
            self._pause_s = _PAUSE_S[0]
        else:
            # The pauses grow, so that a long round does not keep the SuperLink busy with polls.
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])
        return replies


def _not_taken(message: Message) -> Message:
    reason = "Flower did not take the message; the SuperLink's log says why"
    return Message(Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason), reply_to=message)
