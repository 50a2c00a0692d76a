"""A client with a valid token that keeps to no rule, for tests that attack a trunk.

`HostileClient` sends requests over any link, and `RawClient` bytes to an address. Both return what
came back, replies and errors alike. Extend them where an attack needs more.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch
from transformers import PretrainedConfig

from fedsplit.errors import FedsplitError
from fedsplit.link import Link
from fedsplit.model.identity import model_fingerprint
from fedsplit.spec import RunSpec
from fedsplit.transport.frames import SERVICE, Reader
from fedsplit.transport.status import TOKEN_KEY, from_rpc_error
from fedsplit.wire import messages as m

Answer = m.Reply | FedsplitError


class HostileClient:
    """Sends requests in any order, and many at once.

    Args:
        link: Its link to the trunk, with its token.
        config: The model's.
        run: The trunk's run.
        name: The client that the token belongs to.
    """

    def __init__(
        self, link: Link, config: PretrainedConfig, run: RunSpec, name: str = "mallory"
    ) -> None:
        self.link = link
        self.width = config.hidden_size
        self._open = {
            "protocol": m.PROTOCOL,
            "client": name,
            "model": model_fingerprint(config, run.split),
            "config": run.fingerprint,
            "hidden_size": self.width,
            "round": 0,
        }

    def ask(self, request: m.Request[Any]) -> Answer:
        """Send a request once, whatever comes back."""
        try:
            reply: m.Reply = self.link.exchange(request)
        except FedsplitError as error:
            return error
        return reply

    def at_once(self, requests: Sequence[m.Request[Any]]) -> list[Answer]:
        """Send requests all at the same time; the answers are in their order."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self.ask, requests))

    def open(self, **changes: Any) -> str:
        """Open a session, by default one that generates; return its name."""
        asked = {"training": False, "generating": True, **self._open, **changes}
        return self.link.exchange(m.OpenRequest(**asked)).session

    def generate(self, session: str, call: int = 0, **changes: Any) -> m.GenerateRequest:
        """Two sequences of three tokens to generate from."""
        plain = {"past": 0, "logits_to_keep": 1, "smashed_BTD": torch.ones(2, 3, self.width)}
        return m.GenerateRequest(session=session, call=call, **{**plain, **changes})

    def forward(self, session: str, call: int = 0, **changes: Any) -> m.ForwardRequest:
        """A training forward of two sequences of three tokens."""
        plain = {"training": True, "smashed_BTD": torch.ones(2, 3, self.width)}
        return m.ForwardRequest(session=session, call=call, **{**plain, **changes})

    def backward(self, session: str, call: int = 0, **changes: Any) -> m.BackwardRequest:
        """The backward of `forward`, with a gradient of ones."""
        plain = {"want_grad": True, "grad_trunk_out_BTD": torch.ones(2, 3, self.width)}
        return m.BackwardRequest(session=session, call=call, **{**plain, **changes})

    def step(self, session: str, call: int = 0, **changes: Any) -> m.StepRequest:
        """The step after `backward`."""
        plain = {"step": 0, "num_tokens": 6, "client_sq_norm": 0.0}
        return m.StepRequest(session=session, call=call, **{**plain, **changes})


class RawClient:
    """Sends bytes as frames; a context.

    Args:
        address: The server's.
        token: The client's token.
    """

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._metadata = ((TOKEN_KEY, token),)
        self._channel = grpc.insecure_channel(address)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def unary(self, method: str, frame: bytes, *, deadline_s: float = 20.0) -> Any:
        """The answer to one unary call."""
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", bytes, bytes)
        try:
            reply = call(frame, metadata=self._metadata, timeout=deadline_s)
        except grpc.RpcError as error:
            return from_rpc_error(error, self._address, deadline_s)
        return Reader(len(reply)).feed(reply)

    def stream(self, frames: Iterable[bytes], *, deadline_s: float = 20.0) -> list[Any]:
        """All answers on one stream of these frames; the last one is the error that ended it."""
        exchange = self._channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
        reader, answers = Reader(1 << 30), []
        try:
            for frame in exchange(iter(frames), metadata=self._metadata, timeout=deadline_s):
                if (answer := reader.feed(frame)) is not None:
                    answers.append(answer)
        except grpc.RpcError as error:
            answers.append(from_rpc_error(error, self._address, deadline_s))
        return answers
