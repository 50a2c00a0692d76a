"""The time between the tokens of seven chats, alone and beside a long prompt.

Shapes: B sequences, T tokens, D hidden width. The chats and the prompt are clients in processes of
their own. They send random hidden states and run no blocks, so that the trunk is what is measured.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fedsplit.client.remote import RemoteTrunk
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import CloseRequest, GenerateRequest
from simulations.bench.models import Shape
from simulations.bench.processes import Answers, Process, process
from simulations.bench.report import Report
from simulations.bench.roles import name_of, trunk_server
from simulations.bench.scene import Size

_CHATS = 7
_BEFORE = 8
"""Tokens of a chat that are not measured, because the prompts of other chats run beside them."""


def beside_long_prompt(size: Size, report: Report) -> None:
    """Measure the seconds between tokens of chats, in turns alone and beside a long prompt."""
    # The vocabulary is no part of the trunk, and clients with a small one take less memory.
    tokens = max(size.shape.tokens, size.beside_prompt)
    shape = replace(size.shape, vocabulary=128, tokens=tokens)
    with process(trunk_server, shape) as server, ExitStack() as stack:
        address, names = server.ask("address"), [name_of(i) for i in range(1 + _CHATS)]
        secrets = [server.ask("token", name) for name in names]
        long, *chats = (
            stack.enter_context(process(_speaker, shape, address, name, secret))
            for name, secret in zip(names, secrets, strict=True)
        )
        # The first turn warms up.
        turns = [_turn(long, chats, size) for _ in range(1 + size.turns)][1:]
    found = {name: [turn[name] for turn in turns] for name in turns[0]}
    for name, seconds in found.items():
        report.spread("seconds", seconds, by=name)
    p99, alone, beside = (found[name] for name in ("beside_p99", "alone_median", "beside_median"))
    report.figures["others_p99_under_long_prompt"] = report.ratio("p99 / alone_median", p99, alone)
    report.ratio("p99 / beside_median", p99, beside)
    report.ratio("prompt_beside / prompt_alone", found["prompt_beside"], found["prompt_alone"])


def _turn(long: Process, chats: list[Process], size: Size) -> dict[str, float]:
    """Return seconds between tokens of the chats, and those of the prompt, alone and beside."""
    began, ended = long.ask("prompt", size.beside_prompt)
    prompt_alone = ended - began
    _at_once(chats, "open", size.prompt, _BEFORE)
    alone = _gaps(_at_once(chats, "decode", size.beside_tokens // 4))
    for each in chats:
        each.begin("decode", size.beside_tokens)
    began, ended = long.ask("prompt", size.beside_prompt)
    times = [[t for t in each.end() if began <= t <= ended] for each in chats]
    beside = _gaps(times)
    return {
        "alone_median": float(np.median(alone)),
        "beside_median": float(np.median(beside)),
        "beside_p99": float(np.percentile(beside, 99)),
        "prompt_alone": prompt_alone,
        "prompt_beside": ended - began,
    }


def _at_once(chats: list[Process], what: str, *values: int) -> list[list[float]]:
    for each in chats:
        each.begin(what, *values)
    return [each.end() for each in chats]


def _gaps(times: list[list[float]]) -> list[float]:
    return [after - before for each in times for before, after in pairwise(each)]


@contextmanager
def _speaker(shape: Shape, address: str, name: str, token: str) -> Iterator[Answers]:
    """Run a client that answers `open` and `decode` of a chat, and `prompt`.

    `open` begins a chat with a prompt and some tokens. `decode` sends more tokens, and returns the
    times of their replies, in seconds of a clock that all processes share. `prompt` sends a prompt
    in a session of its own, and returns its begin and end.
    """
    with closing(GrpcLink(address, token=token, wire=shape.run.wire)) as link:
        trunk = RemoteTrunk(link, shape.client(), shape.run, client=name)
        chat = _Speech(trunk, shape)

        def open_chat(prompt: int, tokens: int) -> None:
            chat.begin()
            chat.send(prompt)
            decode(tokens)

        def decode(tokens: int) -> list[float]:
            return [chat.send(1) for _ in range(tokens)]

        def prompt(tokens: int) -> tuple[float, float]:
            speech = _Speech(trunk, shape)
            speech.begin()
            began = time.monotonic()
            ended = speech.send(tokens)
            speech.end()
            return began, ended

        yield {"open": open_chat, "decode": decode, "prompt": prompt}


class _Speech:
    """A session with the trunk, which continues with random hidden states."""

    def __init__(self, trunk: RemoteTrunk, shape: Shape) -> None:
        self._trunk = trunk
        self._shape = shape
        self._session = ""
        self._past = self._call = 0

    def begin(self) -> None:
        """End the session, if there is one, and open another one."""
        self.end()
        self._session = self._trunk.open_cache(0)
        self._past = self._call = 0

    def end(self) -> None:
        """End the session."""
        if self._session:
            self._trunk.exchange(CloseRequest(session=self._session))
            self._session = ""

    def send(self, tokens: int) -> float:
        """Send the next tokens, and return the time of the reply."""
        request = GenerateRequest(
            session=self._session,
            call=self._call,
            past=self._past,
            logits_to_keep=1,
            smashed_BTD=self._shape.smashed(1, tokens),
        )
        self._trunk.exchange(request)
        self._past += tokens
        self._call += 1
        return time.monotonic()
