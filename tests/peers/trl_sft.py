"""Train tiny models with trl, whole and split over gRPC, and compare the losses of all steps.

`pip install --no-deps trl` (the development environment has all that it needs), then
`python -m tests.peers.trl_sft`. SFTTrainer trains, and DPOTrainer, whose reference is a split model
too: in float32, clipped as by trl's default, and in bfloat16, trl's default, without clipping. The
factor of clipping may differ in its last bit, which roundings to bfloat16 enlarge. The program ends
with status 1 if a loss of the split model differs from the whole model's by more than 1e-4.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fedsplit.data import load_corpus
from fedsplit.data.tokenizing import train_tokenizer
from fedsplit.serve import Served, hosted, reach, remote_model
from fedsplit.spec import DataSpec, ModelSpec, RunSpec, SplitSpec, TrainSpec, WireSpec
from simulations.families import random_model
from simulations.tiny import tiny_config

FAMILIES = ("gpt2", "llama")
TRAINERS = ("sft", "dpo")
PRECISIONS = {
    "float32": {"bf16": False, "max_grad_norm": 1.0},
    "bfloat16": {"bf16": True, "max_grad_norm": 0.0},
}
STEPS = 30
TOLERANCE = 1e-4

# The trunk's optimizer, with trl's defaults for the client's; the trainers clip at both sides. A
# batch of DPO holds the chosen and the rejected answers: twice trl's batch size.
TRAIN = TrainSpec(
    lr=3e-3,
    beta2=0.999,
    schedule="linear",
    warmup_steps=0,
    max_steps=STEPS,
    batch_size=16,
    clip_norm=0.0,
)
RUN = RunSpec(split=SplitSpec.parse("1/2/1"), model=ModelSpec(attention="auto"), train=TRAIN)
WORDS = "the a client server model trunk gives takes sends weight layer loss and of to".split()


def main() -> None:
    """Run the program."""
    with tempfile.TemporaryDirectory() as temporary:
        losses = {name: pair for family in FAMILIES for name, pair in trained(family, temporary)}
    print("| step | " + " | ".join(f"{name}, whole | split" for name in losses) + " |")
    print("|---" * (1 + 2 * len(losses)) + "|")
    for step in range(STEPS):
        cells = (f"{loss[step]:.6f}" for pair in losses.values() for loss in pair)
        print(f"| {step + 1} | " + " | ".join(cells) + " |")
    largest = {name: difference(*pair) for name, pair in losses.items()}
    print("\n| | largest difference |\n|---|---|")
    for name, value in largest.items():
        print(f"| {name} | {value:.1e}{' UNEQUAL' if value > TOLERANCE else ''} |")
    sys.exit(int(max(largest.values()) > TOLERANCE))


def trained(family: str, temporary: str) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Yield for each trainer its name and the losses of the whole and of the split model."""
    source = str(Path(temporary, family))
    save_model(family, source)
    # Each trainer trains a trunk of its own; nobody trains the reference of DPO.
    names = {
        f"{name}-{precision}": partial(trainer_of, name, source, options)
        for name in TRAINERS
        for precision, options in PRECISIONS.items()
    }
    served = [Served(name=name, model=source) for name in (*names, "reference")]
    with hosted(served, RUN, WireSpec(bind="127.0.0.1:0")) as address:
        for name, make in names.items():
            wanted = losses_of(make(whole_model(source), whole_model(source)))
            reference = remote_model(source, address, served_model_name="reference")
            with reach(source, address, served_model_name=name, run=RUN) as reached:
                trainer = make(reached.model, reference)
                optimizer = trainer.create_optimizer()
                with reached.trunk.session(), reached.trunk.follow(optimizer):
                    found = losses_of(trainer)
            yield f"{family} {name}", (wanted, found)


def save_model(family: str, folder: str) -> None:
    """Save a random model of a family, without dropout, and a tokenizer."""
    tokenizer = train_tokenizer(load_corpus(DataSpec()), 300)
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    config = tiny_config(family, num_hidden_layers=4, vocab_size=len(tokenizer), **ids)
    if family == "gpt2":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def whole_model(source: str) -> PreTrainedModel:
    """The whole model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    return model


def trainer_of(
    name: str, source: str, precision: dict[str, Any], model: Any, reference: Any
) -> Trainer:
    """A trainer of trl; its rate and length are not the defaults."""
    options: dict[str, Any] = {
        **precision,
        "output_dir": f"{source}-{name}",
        "learning_rate": TRAIN.lr,
        "max_steps": STEPS,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    data: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(source)}
    if name == "sft":
        data["train_dataset"] = Dataset.from_dict({"text": texts(100)})
        return SFTTrainer(model=model, args=SFTConfig(**options), **data)
    columns = {"prompt": texts(100), "chosen": texts(100, seed=1), "rejected": texts(100, seed=2)}
    data["train_dataset"] = Dataset.from_dict(columns)
    return DPOTrainer(model=model, ref_model=reference, args=DPOConfig(**options), **data)


def texts(number: int, *, seed: int = 0) -> list[str]:
    """Made-up sentences of different lengths, so that batches have padding."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(number)]


def losses_of(trainer: Trainer) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def difference(wanted: list[float], found: list[float]) -> float:
    """The largest difference of two losses of one step."""
    return max(abs(a - b) for a, b in zip(wanted, found, strict=True))


if __name__ == "__main__":
    main()
