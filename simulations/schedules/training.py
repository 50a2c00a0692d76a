"""The clients of a schedule that train: the bottom is a sum, and the top a product.

Such a client has one weight, so that a wrong reply changes all that comes after it. Like
`ClientTrainer`, it repeats a forward whose graph is gone, and a step that is stale or whose session
is lost.

Shapes: B sequences, T tokens, D hidden width.
"""

import random

import numpy as np
import torch

from fedsplit.errors import ActivationExpired, HistoryLost, SessionLost, StaleVersion
from fedsplit.wire import messages as m
from fedsplit.wire.delta import DeltaEncoder
from simulations.schedules.clients import TOKENS, Client, Program, Saved
from simulations.schedules.events import digest_of
from simulations.schedules.trunk import LR, WIDTH, Array

_ATTEMPTS = 6
_REFORWARDS = 6


class Trainer(Client):
    """A client that trains; `saved` has a state after each step, and the first one."""

    def __post_init__(self) -> None:
        Client.__post_init__(self)
        schedule = self.world.schedule
        self.steps = schedule.steps[schedule.trainers.index(self.name)]
        self.saved.append(Saved(-1, 0, "", np.zeros(1, np.float32), {}))
        self.encoder = DeltaEncoder(self.run.wire, {})

    @property
    def digest(self) -> str:
        """The digest of its weight."""
        return digest_of(self.state.weight)

    @property
    def state(self) -> Saved:
        """The state after the last step."""
        return self.saved[-1]

    def program(self) -> Program:
        """Train until all steps are taken."""
        yield from self.open_to_train()
        attempts = 0
        while self.state.step < self.steps:
            try:
                yield from self.train()
                attempts = 0
            except (StaleVersion, SessionLost):
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
                yield from self.open_to_train()
        yield from self.close()

    def open_to_train(self) -> Program:
        """Open a session that trains."""
        self.encoder.rollback()
        yield from self.open(training=True)

    def trunk_went_back(self, version: int) -> None:
        """Go back to the last step that is part of this version of the trunk."""
        while self.state.version > version:
            self.saved.pop()
        self.encoder = DeltaEncoder(self.run.wire, self.state.references)
        self.note("went back", version=version, note=f"to its step {self.state.step}")

    def train(self) -> Program:
        """Take one step."""
        step, weight, total = self.state.step, self.state.weight, np.zeros(1, np.float32)
        batches = self.world.schedule.batches
        for call in range(step * batches, (step + 1) * batches):
            grad_BTD = yield from self.train_batch(call, weight)
            total += grad_BTD.sum()
        if self.world.schedule.reads_state:
            yield from self.call(m.GradientsRequest(session=self.session, tensors=True))
            yield from self.call(m.TrainingStateRequest(session=self.session))
        reply: m.StepReply = yield from self.call(
            m.StepRequest(
                session=self.session,
                call=call,
                step=step,
                num_tokens=TOKENS * batches,
                client_sq_norm=0.0,
            )
        )
        self.encoder.commit()
        weight = weight - np.float32(LR) * total
        self.saved.append(Saved(reply.version, step + 1, self.instance, weight, self.encoder.state))
        self.note("stepped", version=reply.version, note=f"to its step {step + 1}")

    def train_batch(self, call: int, weight: Array) -> Program:
        """Send a batch forward and backward; return the gradient of its hidden states."""
        x_BTD = numbers(self.name, call, "x") + weight
        forward = m.ForwardRequest(
            session=self.session,
            call=call,
            training=True,
            smashed_BTD=torch.from_numpy(x_BTD),
            codec=self.run.wire.up,
        )
        if self.run.wire.history_bytes:
            with self.encoder.of(torch.tensor([call % 2])):
                forward = self.encoder.encode(forward)
                reply = yield from self.forward(forward)
                reply = self.encoder.decode(forward, reply)
        else:
            reply = yield from self.forward(forward)
        out_BTD = reply.trunk_out_BTD.numpy()
        backward = m.BackwardRequest(
            session=self.session,
            call=call,
            want_grad=True,
            grad_trunk_out_BTD=torch.from_numpy(
                numbers(self.name, call, "grad") + out_BTD * np.float32(2.0**-4)
            ),
        )
        for tries in range(_REFORWARDS):
            try:
                answer: m.BackwardReply = yield from self.call(backward)
                break
            except ActivationExpired:
                if tries:  # the graph expires for lack of memory, so leave time to other clients
                    yield self.wait_s(tries)
                again = yield from self.forward(forward)
                if again.version != reply.version:
                    raise StaleVersion("the graph is gone, and the trunk has moved on") from None
        else:
            answer = yield from self.call(backward)
        assert answer.grad_smashed_BTD is not None
        return answer.grad_smashed_BTD.numpy()

    def forward(self, request: m.ForwardRequest) -> Program:
        """Send a forward; return the reply, which may be a delta."""
        try:
            reply = yield from self.call(request)
        except HistoryLost:
            reply = yield from self.call(self.encoder.with_references(request))
        return reply


def numbers(client: str, call: int, what: str) -> Array:
    """Return the numbers of a batch, in eighths, of a client's call."""
    rng = random.Random(f"{client}/{call}/{what}")
    values = [rng.randint(4, 16) * rng.choice((-1, 1)) / 8 for _ in range(TOKENS * WIDTH)]
    return np.array(values, np.float32).reshape(1, TOKENS, WIDTH)
