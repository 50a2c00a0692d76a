"""A process that generates with a model: plain transformers, or the client of `fedsplit serve`.

    python -m simulations.bench.speaker MODEL ADDRESS DTYPE

It answers lines on stdin, each a JSON list of a name and values, with a line of JSON. ADDRESS is
empty for the unsplit model.
"""

import json
import sys
from time import perf_counter
from typing import Any

from fedsplit.cli.command import quiet, share_cores

TOKEN = "0" * 32


class Speech:
    """The answers of this process."""

    def __init__(self, model: str, address: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fedsplit.serve.client import reach
        from fedsplit.spec import ModelSpec, RunSpec

        self._torch = torch
        self._is_split = bool(address)
        self._model: Any
        if address:
            run = RunSpec(model=ModelSpec(dtype=dtype))
            self._model = reach(model, address, token=TOKEN, run=run).model
        else:
            self._model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
        self._model.eval()

    def text(self, prompt: str, new_tokens: int) -> float:
        """Generate so many tokens; return the seconds."""
        ids_BT = self._ids(prompt)
        began = perf_counter()
        self._model.generate(
            ids_BT,
            attention_mask=self._torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        return perf_counter() - began

    def prompt(self, rows: int, tokens: int) -> float:
        """Run a forward of random tokens; return the seconds."""
        chance = self._torch.Generator().manual_seed(0)
        ids_BT = self._torch.randint(1, 100, (rows, tokens), generator=chance)
        began = perf_counter()
        self._logits(ids_BT)
        return perf_counter() - began

    def tokens(self, prompt: str) -> list[int]:
        """Return the likeliest next token after each token of a text."""
        likeliest: list[int] = self._logits(self._ids(prompt))[0].argmax(dim=-1).tolist()
        return likeliest

    def _logits(self, ids_BT: Any) -> Any:
        # A cache, because a trunk runs a forward without one for a session that trains.
        cache = self._model.new_cache() if self._is_split else None
        with self._torch.no_grad():
            return self._model(ids_BT, past_key_values=cache, use_cache=True).logits

    def _ids(self, prompt: str) -> Any:
        # Its bytes: models of any vocabulary have tokens of these numbers.
        return self._torch.tensor([list(prompt.encode()[:120])])


def main() -> None:
    """Answer lines until stdin ends."""
    model, address, dtype = sys.argv[1:]
    if address:
        share_cores()
    quiet()
    speech = Speech(model, address, dtype)
    for line in sys.stdin:
        name, *values = json.loads(line)
        print(json.dumps(getattr(speech, name)(*values)), flush=True)


if __name__ == "__main__":
    main()
