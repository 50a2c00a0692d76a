"""The turns of a chat: the time to the first token from a cache that holds the text before it.

Each is compared with a fresh session of the same text. Shapes: B sequences (always one), T tokens.
"""

import copy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedsplit.serve.reuse import keep_first
from simulations.bench.models import text_of
from simulations.bench.report import in_turns
from simulations.bench.scene import Scene


def first_tokens(scene: Scene) -> None:
    """Measure a second turn after a long prompt, and a session that copies a long prompt."""
    size, report, model = scene.size, scene.report, scene.client
    trunk = scene.far()
    prompt_BT = scene.prompt(1, size.long_prompt)
    new_BT = scene.prompt(1, size.long_prompt + size.prompt)[:, size.long_prompt :]
    chat, system = model.new_cache(), model.new_cache()
    answer_BT = text_of(model, prompt_BT, size.new_tokens, past_key_values=chat)
    text_of(model, prompt_BT, 1, past_key_values=system)
    turn_BT = torch.cat((answer_BT, new_BT), dim=1)
    session_BT = torch.cat((prompt_BT, new_BT), dim=1)
    held: Any = chat.get_seq_length()

    def second_turn() -> float:
        seconds = _first_token(model, turn_BT, lambda: chat)
        keep_first(chat, held)
        return seconds

    def after(text_BT: Tensor, make: Any) -> float:
        seconds = _first_token(model, text_BT, make)
        trunk.end_generations()
        return seconds

    measures = {
        "second_turn": second_turn,
        "fresh": lambda: after(turn_BT, model.new_cache),
        "copied_prompt": lambda: after(session_BT, lambda: copy.deepcopy(system)),
        "fresh_prompt": lambda: after(session_BT, model.new_cache),
    }
    found = in_turns(size.turns, measures)
    for name, values in found.items():
        report.spread("first_token_s", values, by=name)
    report.figures["second_turn_first_token"] = report.ratio(
        "second_turn / fresh", found["second_turn"], found["fresh"], tokens=turn_BT.shape[1]
    )
    report.ratio(
        "copied_prompt / fresh_prompt",
        found["copied_prompt"],
        found["fresh_prompt"],
        tokens=session_BT.shape[1],
    )
    scene.link.forget()


def _first_token(model: Any, text_BT: Tensor, make: Any) -> float:
    """Return the seconds from a text to the token after it, with what `make` needs for a cache."""
    began = perf_counter()
    text_of(model, text_BT, 1, past_key_values=make())
    return perf_counter() - began
