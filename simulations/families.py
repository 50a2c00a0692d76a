"""Tries to split every causal language model of transformers, and compares it with the unsplit one.

`python -m simulations.families [type ...] [--json FILE]` makes a tiny random model of each type,
splits it and compares logits, loss and the gradient of every parameter with the unsplit model's,
without padding and with padding at either side. Equal means equal in every bit.

With `--tp N` it trains and decodes with each trunk cut over N ranks instead, and compares the
values and the tokens with those of the trunk in one process. Equal means within 1e-5, and all
tokens.
"""

import argparse
import copy
import gc
import inspect
import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.errors import ConfigError, UnsupportedModel
from fedsplit.model.build import SplitModel, split_model
from fedsplit.model.dryrun import FAMILY_ERRORS
from fedsplit.model.plan import model_class_for, plan_for
from simulations.sharded import judged, without_dropout
from simulations.tiny import VOCABULARY, tiny_config

SECONDS_PER_TYPE = 60
EXACT, REFUSED, NO_CONFIG = "exact", "refused", "no tiny config"
DIFFERS, FAILED = "differs", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one model type; `detail` is the reason or the largest difference."""

    model_type: str
    outcome: str
    detail: str = ""


@ending_with_its_reader()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and the closing line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="cut trunks over N ranks")
    args = parser.parse_args(argv)
    # On models this small, threads cost more than they save.
    torch.set_num_threads(1)
    quiet_libraries()
    verdicts = []
    for model_type in args.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdict = judge(model_type, args.tp)
        verdicts.append(verdict)
        print(
            f"{verdict.model_type:<28} {verdict.outcome:<15} {verdict.detail}".rstrip(), flush=True
        )
        # Models have reference cycles, and hundreds of types would otherwise pile up.
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps([asdict(v) for v in verdicts], indent=2) + "\n")
    print(closing_lines(verdicts, args.tp))


def closing_lines(verdicts: Sequence[Verdict], ranks: int = 1) -> str:
    """Return the counts of outcomes, after a line with the types that differ or fail, if any."""
    count = Counter(v.outcome for v in verdicts)
    line = f"{count[EXACT]} exact, {count[REFUSED]} refused"
    if ranks > 1:
        line = f"{count[NO_CONFIG]} without a tiny config\ntp: {line}"
    else:
        line = f"families: {line}, {count[NO_CONFIG]} without a tiny config"
    others = [f"{v.model_type} {v.outcome}" for v in verdicts if v.outcome in (DIFFERS, FAILED)]
    return f"neither: {', '.join(others)}\n{line}" if others else line


def judge(model_type: str, ranks: int = 1) -> Verdict:
    """Split a tiny model of this type, and compare it with the unsplit one.

    With several ranks, compare its trunk on these ranks with the one in one process.
    """
    outcome, detail = FAILED, f"not done in {SECONDS_PER_TYPE} s"
    try:
        with time_limit(SECONDS_PER_TYPE):
            outcome, detail = _tried(model_type, ranks)
    except TimeoutError:
        pass
    except FAMILY_ERRORS as exc:
        detail = " ".join(f"{type(exc).__name__}: {exc}".split())[:160]
    return Verdict(model_type=model_type, outcome=outcome, detail=detail)


def _tried(model_type: str, ranks: int) -> tuple[str, str]:
    try:
        config = tiny_config(model_type)
    except ConfigError as exc:
        return NO_CONFIG, str(exc)
    family = model_class_for(config)
    try:
        plan = plan_for(family, config)
    except UnsupportedModel as exc:
        return REFUSED, str(exc)
    if ranks > 1:
        return _tried_on(config, ranks)
    whole = random_model(config)
    fault = _fault_of_whole(whole)
    if fault:
        return NO_CONFIG, f"the unsplit tiny model does not run ({fault})"
    split = f"2/*/{plan.num_blocks - 4}" if plan.num_blocks > 4 else "1/*/1"
    try:
        parts = split_model(whole, split)
    except UnsupportedModel as exc:
        return REFUSED, str(exc)
    worst = max(difference(whole, parts, batch) for batch in batches(family).values())
    return (EXACT, "") if worst == 0.0 else (DIFFERS, f"largest difference {worst:.3g}")


def _tried_on(config: PretrainedConfig, ranks: int) -> tuple[str, str]:
    whole = random_model(without_dropout(config))
    try:
        is_exact, detail = judged(whole, ranks)
    except UnsupportedModel as exc:
        return REFUSED, str(exc)
    return EXACT if is_exact else DIFFERS, detail


def random_model(config: PretrainedConfig, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return an unsplit model with random weights.

    No weight is trivial: no bias is zero and no norm is one, so a part that ignores one differs.
    """
    # The caller's random generators stay as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = model_class_for(config)
        whole: PreTrainedModel = family._from_config(copy.deepcopy(config), **options).eval()
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.is_floating_point() and torch.isfinite(parameter).all():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return whole


def batches(family: type[PreTrainedModel]) -> dict[str, dict[str, Tensor]]:
    """Return a batch of 3 x 14 tokens without padding, padded right, and padded left."""
    generator = torch.Generator().manual_seed(1)
    # Ids from 3: the three below are the tiny configs' special tokens.
    ids_BT = torch.randint(3, VOCABULARY, (3, 14), generator=generator)
    right_BT, left_BT = torch.ones_like(ids_BT), torch.ones_like(ids_BT)
    right_BT[0, 9:] = right_BT[1, 12:] = 0
    left_BT[0, :5] = left_BT[1, :2] = 0
    left = {"attention_mask": left_BT}
    if "position_ids" in inspect.signature(family.forward).parameters:
        # Positions count real tokens only, as in `generate` of transformers.
        left["position_ids"] = (left_BT.cumsum(-1) - 1).clamp(min=0)
    padded = {"right": {"attention_mask": right_BT}, "left": left}
    labelled = {
        name: {"labels": ids_BT.masked_fill(kw["attention_mask"] == 0, -100), **kw}
        for name, kw in padded.items()
    }
    cases = {"none": {"labels": ids_BT}, **labelled}
    return {name: {"input_ids": ids_BT, **kw} for name, kw in cases.items()}


def difference(whole: PreTrainedModel, parts: SplitModel, batch: dict[str, Tensor]) -> float:
    """Return the largest difference of logits, loss and gradients between unsplit and split model.

    It is infinite if one of them lacks a gradient.
    """
    expected = _results([whole], batch)
    actual = _results([parts.client, parts.trunk], batch)
    if expected.keys() != actual.keys():
        return float("inf")
    return max(_distance(expected[name], actual[name]) for name in expected)


def _results(models: list[Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Call the first model, and return its loss, logits of real tokens, and all gradients."""
    for model in models:
        model.zero_grad()
    out = models[0](**batch, use_cache=False)
    out.loss.backward()
    real_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    gradients = {
        name: parameter.grad
        for model in models
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
    return {"logits": out.logits.detach()[real_BT], "loss": out.loss.detach(), **gradients}


def _distance(expected: Tensor, actual: Tensor) -> float:
    if torch.equal(expected, actual):
        return 0.0
    gap = float((expected - actual).abs().max()) if expected.shape == actual.shape else float("inf")
    # A NaN is not equal to itself, and its gap is not above zero.
    return gap if gap > 0.0 else float("inf")


def _fault_of_whole(whole: PreTrainedModel) -> str:
    """Return why the unsplit model cannot be the reference; empty if it can."""
    try:
        results = _results([whole], batches(type(whole))["none"])
    except FAMILY_ERRORS as exc:
        return " ".join(f"{type(exc).__name__}: {exc}".split())[:100]
    if not all(torch.isfinite(tensor).all() for tensor in results.values()):
        return "its logits or gradients are not finite"
    return "" if results["logits"].std() > 0 else "its logits are all equal"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer."""

    # A signal, because a family's own code cannot be interrupted from a thread.
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


if __name__ == "__main__":
    main()
