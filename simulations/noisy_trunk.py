"""Trains a trunk with public text under the noise of a shield, and measures what that is worth.

    python -m simulations.smollm2 MODEL_DIR
    python -m simulations.noisy_trunk MODEL_DIR --public PUBLIC --private PRIVATE \
        --split 1/*/1 --z 0.2 --steps 100000 --minutes 8 --device cuda --json FILE

The publisher of a model may train its trunk so that it is useful to clients whose rows are noisy.
Bottom and top stay as they are, so a server reads as much of the rows as before. The trunk gets
adapters, and learns to give the top what makes the model predict as it does without noise
(distillation: the KL divergence from the model's own predictions). Every step has new noise.

Measured are losses on private text in nats per token: `noisy` with the shield, `clean` without.
`recovered` is the share of private tokens that the strongest attack reads (MAP beam search with the
exact likelihood, and the model as the prior). `no_trunk` is the loss of the client's own blocks,
with adapters that were trained in the same way and for as many steps: a trunk is worth nothing to
clients if it is not below that.

PUBLIC and PRIVATE are files with a text a line, or directories with a text a file. The figures of
docs/privacy.md are of Perl's manual (`pod2text -u` of the .pm and .pod files of Debian's
/usr/share/perl and /usr/share/perl5), and of Python's: `pydoc_data.topics`, a file for each topic.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsplit import atomic
from fedsplit.audit.attacks.search import search
from fedsplit.audit.scene import share_equal
from fedsplit.client.privacy import NoiseKey, Shield
from fedsplit.client.public_text import public_rows
from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.data import load_corpus, load_tokenizer, tokenize
from fedsplit.data.batches import whole_rows
from fedsplit.errors import FedsplitError
from fedsplit.model import connect, split_model
from fedsplit.model.lora import add_adapters, trainable
from fedsplit.model.trunkless import without_trunk
from fedsplit.optimization import PartOptimizer, clip_coefficient
from fedsplit.spec import DataSpec, LoraSpec, SplitSpec, TrainSpec
from simulations.bench.report import Report

_TRAIN = TrainSpec(lr=3e-3, schedule="constant", warmup_steps=10)
_STATISTICS = 8192
"""The public tokens from which the shield takes its statistics, at most."""
_BEAMS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is trained and measured.

    Attributes:
        model: The directory of a model, or its hub id.
        public, private: The texts.
        split: The blocks of bottom, trunk and top.
        z: The noise, in units of the public radius.
        steps: The steps of the training, at most.
        minutes: The time of the trunk's training, at most. All the rest takes about half as much.
        rank: The rank of the adapters.
        batch: The sequences of a step.
        tokens: The tokens of a sequence.
        every: The steps from one measurement to the next.
        measured: The private sequences of a measurement.
        attacked: The private sequences that are attacked.
        attacked_tokens: The tokens of each of them.
        shortlist: The tokens that the attack tries at a place; 0 for all, which takes far longer.
        device: Where the models train. The attack is on the CPU.
        seed: Decides adapters, order and noise.
    """

    model: str
    public: str
    private: str
    split: str = "4/*/4"
    z: float = 0.2
    steps: int = 100
    minutes: float = 8.0
    rank: int = 16
    batch: int = 8
    tokens: int = 128
    every: int = 50
    measured: int = 16
    attacked: int = 4
    attacked_tokens: int = 32
    shortlist: int = 256
    device: str = "cpu"
    seed: int = 0


class NoisyTrunk:
    """A model that is split, with a shield between its parts, and the texts.

    Args:
        trial: What is measured.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.public_BT = _ids(trial, trial.public)
        self.private_BT = _ids(trial, trial.private)[: trial.measured]
        self.whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            trial.model, trust_remote_code=False, dtype=torch.float32
        )
        self.parts = split_model(self.whole, trial.split)
        for model in (self.whole, self.parts.client, self.parts.trunk):
            nn.Module.to(model, trial.device).requires_grad_(False)
        enough = max(1, _STATISTICS // trial.tokens)
        self.statistics = public_rows(self.parts.client, self.public_BT[:enough])

    def clean(self, ids_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the split model without noise."""
        return self._logits(self.parts.trunk.run, ids_BT)

    def noisy(self, ids_BT: Tensor, noise: str = "measured") -> Tensor:
        """Return the logits under noise; the same name gives the same noise."""
        key = self._key(noise)
        return self._logits(
            Shield(self.parts.trunk.run, self.statistics, key, z=self.trial.z), ids_BT
        )

    @torch.no_grad()
    def predicted(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the model in one piece, as it was before the training."""
        logits_BTV: Tensor = self.whole(ids_BT.to(self.trial.device), use_cache=False).logits
        return logits_BTV

    @torch.no_grad()
    def loss(self, forward: Callable[[Tensor], Tensor]) -> float:
        """Return the loss of the private text, in nats per token."""
        losses = []
        for ids_BT in self.private_BT.split(self.trial.batch):
            logits_NV = forward(ids_BT)[:, :-1].flatten(0, 1).float().cpu()
            losses.append(F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="none"))
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def sent(self, ids_BT: Tensor, z: float) -> Tensor:
        """Return the rows [B, T, D] that leave the client, on the CPU.

        They are not shrunk: a server that receives shrunk rows can undo that.
        """
        rows: list[Tensor] = []

        def carry(rows_BTD: Tensor, **_: object) -> Tensor:
            rows.append(rows_BTD.cpu())
            return rows_BTD

        key = self._key("measured")
        self._logits(Shield(carry, self.statistics, key, z=z, shrink=False), ids_BT)
        return rows[0]

    def _logits(self, carry: Callable[..., Tensor], ids_BT: Tensor) -> Tensor:
        client = self.parts.client
        connect(client, carry)
        logits_BTV: Tensor = client(input_ids=ids_BT.to(client.device), use_cache=False).logits
        return logits_BTV

    def _key(self, noise: str) -> NoiseKey:
        # No secret is protected here, and a trial can be repeated.
        return NoiseKey(hashlib.sha256(f"{self.trial.seed} {noise}".encode()).digest())


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Student:
    """A model that learns to predict as the whole model does.

    Attributes:
        model: It gets adapters.
        forward: Returns logits for token ids and the name of the noise.
        losses: Returns its losses on private text, by name.
    """

    model: PreTrainedModel
    forward: Callable[[Tensor, str], Tensor]
    losses: Callable[[], dict[str, float]]


def measure(trial: Trial) -> Report:
    """Train and attack, and return the losses and shares.

    Raises:
        FedsplitError: The model cannot be split so, or there is too little text.
    """
    report, noisy = Report(), NoisyTrunk(trial)
    trunk = _Student(
        model=noisy.parts.trunk,
        forward=noisy.noisy,
        losses=lambda: {"noisy": noisy.loss(noisy.noisy), "clean": noisy.loss(noisy.clean)},
    )
    steps = _train(trunk, noisy, report, trial)
    # Its blocks are fewer, and it takes as many steps.
    _train(_without_trunk(noisy), noisy, report, replace(trial, steps=steps, minutes=math.inf))
    _attack(noisy, report)
    return report


def _without_trunk(noisy: NoisyTrunk) -> _Student:
    """Return the client's own blocks, which need no noise since nothing leaves."""
    ends = without_trunk(noisy.parts.client)
    nn.Module.to(ends, noisy.trial.device)

    def forward(ids_BT: Tensor, _: str = "") -> Tensor:
        logits_BTV: Tensor = ends(input_ids=ids_BT.to(ends.device), use_cache=False).logits
        return logits_BTV

    return _Student(model=ends, forward=forward, losses=lambda: {"no_trunk": noisy.loss(forward)})


def _train(student: _Student, noisy: NoisyTrunk, report: Report, trial: Trial) -> int:
    """Train adapters of a student; return the number of steps."""
    lora = LoraSpec(enabled=True, rank=trial.rank, alpha=2 * trial.rank, targets="all-linear")
    add_adapters(student.model, lora, trial.seed)
    optimizer = PartOptimizer(trainable(student.model), _TRAIN)
    step, began = 0, time.monotonic()

    def look(moment: str = "") -> None:
        losses = student.losses()
        report.row("loss", step=step, minutes=_minutes(began), **losses)
        if moment:
            report.figures |= {f"{name}_{moment}": loss for name, loss in losses.items()}

    look("before")
    while (done := max(step / trial.steps, _minutes(began) / trial.minutes)) < 1.0:
        first = step * trial.batch % max(1, len(noisy.public_BT) - trial.batch)
        ids_BT = noisy.public_BT[first : first + trial.batch]
        loss = _divergence(student.forward(ids_BT, f"step {step}"), noisy.predicted(ids_BT))
        loss.backward()
        clip = clip_coefficient(optimizer.sq_norm(), _TRAIN.clip_norm)
        optimizer.step(step, clip, lr_scale=1.0 - done)
        step += 1
        if step % trial.every == 0:
            look()
    look("after")
    report.figures["steps"] = float(step)
    return step


def _minutes(began: float) -> float:
    return (time.monotonic() - began) / 60


def _divergence(logits_BTV: Tensor, target_BTV: Tensor) -> Tensor:
    """Return the mean KL divergence from the target's predictions, in nats per token."""
    target_NV, logits_NV = (each.flatten(0, 1) for each in (target_BTV, logits_BTV))
    return F.kl_div(
        logits_NV.log_softmax(-1),
        target_NV.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


# --- the attack -----------------------------------------------------------------------------------


def _attack(noisy: NoisyTrunk, report: Report) -> None:
    """Add what the strongest attack reads of private text, with the noise and without."""
    trial, statistics = noisy.trial, noisy.statistics
    private_BT = noisy.private_BT[: trial.attacked, : trial.attacked_tokens]
    known = partial(
        search,
        ends=without_trunk(noisy.parts.client.cpu()),
        bottom=SplitSpec.parse(trial.split).bottom,
        shortlist=trial.shortlist,
    )
    prior = noisy.whole.cpu()
    under_noise_BT = known(
        noisy.sent(private_BT, trial.z),
        sigma=trial.z * statistics.radius,
        expected=statistics.clipped,
        prior=prior,
        beams=_BEAMS,
    )
    report.figures |= {
        "recovered": share_equal(under_noise_BT, private_BT),
        "recovered_clean": share_equal(known(noisy.sent(private_BT, 0.0)), private_BT),
        "chance": float(torch.bincount(private_BT.flatten()).max()) / private_BT.numel(),
    }


# --- the command ----------------------------------------------------------------------------------


def _ids(trial: Trial, path: str) -> Tensor:
    """Return the token ids [B, T] of texts, in a random order."""
    data = DataSpec(kind="text", path=path, sequence_length=trial.tokens)
    corpus = load_corpus(data)
    examples = tokenize(corpus, load_tokenizer(trial.model), data)
    ids_BT = whole_rows(examples, corpus.name, len(examples), trial.tokens)
    order = torch.randperm(len(ids_BT), generator=torch.Generator().manual_seed(trial.seed))
    return ids_BT[order]


@ending_with_its_reader()
def main(words: list[str] | None = None) -> int:
    """Run the trial of the command line; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.noisy_trunk", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("model", metavar="MODEL", help="a model's directory or hub id")
    for name in ("public", "private"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE", help=f"{name} text")
    for each in fields(Trial):
        if each.default is not MISSING:
            usual = each.default
            option = f"--{each.name.replace('_', '-')}"
            parser.add_argument(option, type=type(usual), default=usual)
    parser.add_argument("--json", type=Path, metavar="FILE", help="gets trial, figures and rows")
    given = vars(parser.parse_args(words))
    file = given.pop("json")
    quiet_libraries()
    trial = Trial(**given)
    try:
        report = measure(trial)
    except FedsplitError as error:
        print(f"noisy_trunk: {error}", file=sys.stderr)
        return 2
    print(report)
    if file:
        found = {"trial": asdict(trial), **report.as_json()}
        atomic.write_text(file, json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
