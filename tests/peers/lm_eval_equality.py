"""Evaluate tiny models with lm-eval, whole and split over gRPC, and compare the results.

`pip install lm_eval`, then `python -m tests.peers.lm_eval_equality`. The program ends with status 1
if a result of the split model differs from the whole model's.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.data import load_corpus
from fedsplit.data.tokenizing import train_tokenizer
from fedsplit.serve import Served, hosted, remote_model
from fedsplit.spec import DataSpec, ModelSpec, RunSpec, SplitSpec, WireSpec
from simulations.families import random_model
from simulations.tiny import tiny_config

FAMILIES = ("gpt2", "llama", "gemma2")
TOLERANCE = 1e-3
"""The largest difference of two sums of log-likelihoods, which are in the hundreds."""

CONTEXTS = ["Once upon a time", "The with statement", "A class is", "When an error occurs,"]
CONTINUATIONS = [" there was", " is used to", " a group of objects that have", " the"]
TEXT = "The statement is executed once, and the names that it binds are local to the block. "
ROLLING = [TEXT, 12 * TEXT, "No."]
"""One of them is longer than the models' windows."""

UNTIL = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
REQUESTS: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": list(zip(CONTEXTS, CONTINUATIONS, strict=True)),
    "loglikelihood_rolling": [(text,) for text in ROLLING],
    "generate_until": [(text, UNTIL) for text in CONTEXTS],
}


def main() -> None:
    """Run the program."""
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(compared(Path(temporary)))
    print("| family | request | results | largest difference | |\n|---|---|---|---|---|")
    for family, kind, number, difference in rows:
        equal = "equal" if difference <= TOLERANCE else "UNEQUAL"
        print(f"| {family} | {kind} | {number} | {difference:.1e} | {equal} |")
    sys.exit(int(any(difference > TOLERANCE for *_, difference in rows)))


def compared(folder: Path) -> Iterator[tuple[str, str, int, float]]:
    """Yield the family, the kind of request, the number of results, and their difference."""
    served = []
    for family in FAMILIES:
        save_model(family, folder / family)
        served.append(Served(name=family, model=str(folder / family)))
    run = RunSpec(split=SplitSpec.parse("1/2/1"), model=ModelSpec(attention="auto"))
    with hosted(served, run, WireSpec(bind="127.0.0.1:0")) as address:
        for family in FAMILIES:
            source = str(folder / family)
            whole = AutoModelForCausalLM.from_pretrained(source)
            split = remote_model(source, address, served_model_name=family)
            tokenizer = AutoTokenizer.from_pretrained(source)
            models = [
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
                for model in (whole, split)
            ]
            for kind in REQUESTS:
                wanted, got = (results(model, kind) for model in models)
                yield family, kind, len(got), difference(got, wanted)


def save_model(family: str, folder: Path) -> None:
    """Save a random model of a family, and a tokenizer."""
    tokenizer = train_tokenizer(load_corpus(DataSpec()), 300)
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    config = tiny_config(family, num_hidden_layers=4, vocab_size=len(tokenizer), **ids)
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def results(model: HFLM, kind: str) -> list[Any]:
    """The results of a model for all requests of a kind."""
    instances = [
        Instance(request_type=kind, doc={}, arguments=arguments, idx=i)
        for i, arguments in enumerate(REQUESTS[kind])
    ]
    torch.manual_seed(0)
    found: list[Any] = getattr(model, kind)(instances, disable_tqdm=True)
    return found


def difference(got: list[Any], wanted: list[Any]) -> float:
    """The largest difference of two lists of results; infinite between two texts."""
    pairs = zip(sum(map(values, got), []), sum(map(values, wanted), []), strict=True)
    return max(0.0 if a == b else _gap(a, b) for a, b in pairs)


def values(result: Any) -> list[Any]:
    """The values of one result: a text, a number, or a number and whether it is greedy."""
    return list(result) if isinstance(result, tuple) else [result]


def _gap(a: Any, b: Any) -> float:
    return abs(a - b) if isinstance(a, float) else float("inf")


if __name__ == "__main__":
    main()
