"""The clients of a schedule that generate: the next token depends on the output of the last one.

Shapes: B sequences, T tokens, D hidden width.
"""

import numpy as np
import torch

from fedsplit.errors import SessionLost
from fedsplit.wire import messages as m
from simulations.schedules.clients import TOKENS, Client, Program
from simulations.schedules.trunk import Array


class Speaker(Client):
    """A client that generates: the hidden states of the next token depend on the output."""

    def program(self) -> Program:
        """Generate a text, and replay it whenever the trunk has lost it."""
        schedule = self.world.schedule
        wanted = schedule.tokens[schedule.speakers.index(self.name)]
        history = [hidden_of(token) for token in range(TOKENS)]
        text: list[int] = []
        past = 0
        yield from self.open_to_generate()
        while len(text) < wanted:
            try:
                out = yield from self.next(history, past)
            except SessionLost:
                past = self.after_a_loss(history)
                yield from self.open_to_generate()
                continue
            past = len(history)
            text.append(token_of(out))
            history.append(hidden_of(text[-1]))
        self.note("generated", note=" ".join(map(str, text)))
        yield from self.close()

    def open_to_generate(self) -> Program:
        """Open a session that generates."""
        yield from self.open(training=False, generating=True)
        self.calls = 0

    def after_a_loss(self, history: list[Array]) -> int:
        """Return how many tokens a new session need not be sent again."""
        return 0

    def next(self, history: list[Array], past: int) -> Program:
        """Send the tokens after the first `past`; return the output of the last one."""
        x_BTD = np.stack(history[past:])[None]
        self.calls += 1
        reply: m.GenerateReply = yield from self.call(
            m.GenerateRequest(
                session=self.session,
                call=self.calls - 1,
                past=past,
                logits_to_keep=1,
                smashed_BTD=torch.from_numpy(x_BTD),
            )
        )
        return reply.trunk_out_BTD.numpy()[0, -1]


def hidden_of(token: int) -> Array:
    """Return the hidden states of a token."""
    return np.array([token % 5 / 4, (token % 3 - 1) / 2], np.float32)


def token_of(out_D: Array) -> int:
    """Return the next token for an output."""
    return int(np.floor(float(out_D @ np.array([8.0, 5.0], np.float32)))) % 11
