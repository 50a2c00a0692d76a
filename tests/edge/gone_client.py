"""A client of a trunk that stops itself in the middle of a step, after the reply to a request.

Run as a script with the trunk's address, the client's token, its policy and deadline, the class of
the request, its number, and a signal; it prints the number of its steps at the end.
"""

import os
import signal
import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

from transformers import GPT2Config

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.model import connect, initial_parts
from fedsplit.spec import PolicySpec, RunSpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import R, Request
from tests.core.worlds import batch, small_run

NAME = "client-0"
STEPS = 4
CONFIG = GPT2Config(
    n_layer=3, n_embd=16, n_head=2, n_positions=16, vocab_size=64, bos_token_id=0, eos_token_id=0
)
POLICIES: dict[str, dict[str, Any]] = {
    "sync": {},
    "quorum": {"kind": "quorum", "quorum": 2},
    "async": {"kind": "async"},
}


def run_of(policy: str, deadline_s: float) -> RunSpec:
    """The run of both sides; a step waits `deadline_s` for a client that is gone."""
    chosen = PolicySpec(**POLICIES[policy], deadline_s=deadline_s)
    # A session that never had a request is dropped after the time to live of a graph.
    wire = WireSpec(budget_s=60.0, call_deadline_s=20.0, stash_ttl_s=1.0)
    run = small_run(policy=chosen, clients=3, wire=wire)
    return replace(run, train=replace(run.train, local_steps=STEPS))


class StoppingLink(GrpcLink):
    """Sends its own process a signal after the reply to one of the requests."""

    def __init__(self, address: str, token: str, wire: WireSpec, point: tuple[str, int]) -> None:
        super().__init__(address, token=token, wire=wire)
        self._kind, self._left = point

    def exchange(self, request: Request[R]) -> R:
        reply = super().exchange(request)
        if type(request).__name__ == self._kind:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), int(sys.argv[7]))
        return reply


def train(address: str, token: str, policy: str, deadline_s: str, kind: str, number: str) -> int:
    """Train the steps of a round; return how many were taken."""
    run = run_of(policy, float(deadline_s))
    model = initial_parts(CONFIG, run.split, run.seed).client
    point = kind, int(number)
    with closing(StoppingLink(address, token, run.wire, point)) as link:
        trunk = RemoteTrunk(link, model, run, client=NAME)
        connect(model, trunk)
        trainer = ClientTrainer(model, trunk, run)
        return trainer.fit([batch(seed)] for seed in range(STEPS)).steps


if __name__ == "__main__":
    signal.alarm(120)  # no test waits longer for it
    print(train(*sys.argv[1:7]), flush=True)
