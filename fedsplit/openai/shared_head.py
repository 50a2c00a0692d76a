"""The head of a model for requests at a time, which computes the rows of several of them at once.

A head often has more weights than all blocks of the client, and reads all of them for a row. Rows
that are computed at once read them once. Shapes: B sequences, T tokens, R rows, D hidden,
V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedsplit.model import ClientPart


@contextmanager
def shared_head(model: ClientPart) -> Iterator[None]:
    """A context in which several threads may generate, and share the passes of the model's head.

    A model whose head transformers does not name computes as it does outside of it.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        yield
        return
    # The class has one; a module has its own if a library has put hooks around it.
    own = vars(head).get("forward")
    head.forward = _Shared(head.forward)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


class _Shared:
    """A function of [B, T, D] whose rows do not depend on one another; for several threads.

    Nobody waits for others to come. A call that finds the function idle runs at once, and those
    that come meanwhile run together after it.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._turn = threading.Lock()
        self._waiting: dict[object, Tensor] = {}
        self._done: dict[object, Tensor] = {}

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        call = object()
        self._waiting[call] = hidden_BTD
        with self._turn:
            try:
                # It is done already if the call before took it along.
                if call not in self._done:
                    self._run()
                return self._done.pop(call)
            finally:
                # After a failure, so that it fails no other call.
                self._waiting.pop(call, None)

    def _run(self) -> None:
        calls = dict(self._waiting)
        rows = [hidden_BTD.flatten(0, -2) for hidden_BTD in calls.values()]
        outs = self._forward(torch.cat(rows)).split([len(each) for each in rows])
        for (call, hidden_BTD), out_RV in zip(calls.items(), outs, strict=True):
            del self._waiting[call]
            self._done[call] = out_RV.unflatten(0, hidden_BTD.shape[:-1])
