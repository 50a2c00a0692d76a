"""The memory, loss and speed of a split model whose frozen layers have 32, 16, 8 or 4 bits.

    python -m simulations.memory DIR --json FILE

DIR is the folder of a pretrained causal language model, such as that of `simulations.smollm2`. Each
precision is measured in a process of its own: one client trains adapters with a trunk in the same
process, then it generates. The columns say what the weights of each part take, and by how much the
process grew at most while it read the trunk.
"""

import argparse
import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import from_yaml, to_yaml
from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.data import (
    evaluation_batches,
    hold_out,
    load_corpus,
    load_tokenizer,
    tokenize,
    training_batches,
)
from fedsplit.errors import FedsplitError
from fedsplit.link import LocalLink
from fedsplit.model import ClientPart, connect
from fedsplit.model.describe import client_of, config_of, trunk_of
from fedsplit.spec import DataSpec, LoraSpec, ModelSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.telemetry.round import in_mib
from fedsplit.trunk.service import TrunkService
from simulations.bench.report import Report

PRECISIONS = {
    "fp32": ModelSpec(),
    "bf16": ModelSpec(dtype="bfloat16"),
    "int8": ModelSpec(dtype="bfloat16", quantize="int8"),
    "nf4": ModelSpec(dtype="bfloat16", quantize="nf4"),
    "nf4_client": ModelSpec(dtype="bfloat16", quantize="nf4", quantize_client="nf4"),
}
"""Models with these layers. The trunk is quantized, and in the last one the client's blocks too;
what is not quantized beside them is in bfloat16."""

_HELD_OUT_BATCHES, _NEW_TOKENS = 8, 32


def measure(folder: Path, steps: int) -> Report:
    """Return the rows of all precisions after equal steps, and figures relative to bf16 and fp32.

    Args:
        folder: A pretrained causal language model.
        steps: Optimizer steps of 4 sequences of 64 tokens.
    """
    report, rows = Report(), {}
    for name, model in PRECISIONS.items():
        run = RunSpec(
            model=ModelSpec(**{**_fields(model), "pretrained": str(folder)}),
            split=SplitSpec.parse("1/*/1"),
            clients=1,
            lora=LoraSpec(enabled=True, targets="all-linear"),
            data=DataSpec(sequence_length=64),
            train=TrainSpec(local_steps=steps, batch_size=4, lr=5e-4),
        )
        rows[name] = row = _in_a_process(run)
        sizes = {key: in_mib(int(value)) for key, value in row.items() if key.endswith("_bytes")}
        others = {key: value for key, value in row.items() if not key.endswith("_bytes")}
        report.row("precision", precision=name, **sizes, **others)
    report.rows = [{"of": "precision", "precision": name, **row} for name, row in rows.items()]
    report.figures = {
        "nf4_of_bf16": rows["nf4"]["trunk_bytes"] / rows["bf16"]["trunk_bytes"],
        "nf4_reading_of_fp32": rows["nf4"]["reading_bytes"] / rows["fp32"]["trunk_bytes"],
    }
    for name in list(rows)[1:]:
        excess = rows[name]["held_out"] / rows["fp32"]["held_out"] - 1
        report.figures[f"excess_loss_{name}"] = excess
    return report


def _fields(model: ModelSpec) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ("dtype", "quantize", "quantize_client")}


def _in_a_process(run: RunSpec) -> dict[str, float]:
    # An allocator does not return all memory of earlier work.
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_row, args=(to_yaml(run), sender), daemon=True)
    process.start()
    sender.close()
    with receiver:
        row: dict[str, float] = json.loads(receiver.recv_bytes())
    process.join()
    return row


def _row(config: str, sender: Any) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    run = from_yaml(config)
    settings = config_of(run, None)
    # A part is read before the one that counts, so that libraries and tables have their memory.
    client = client_of(run, settings)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trunk = trunk_of(run, settings)
    row: dict[str, float] = {
        "trunk_bytes": _num_bytes(trunk),
        "client_bytes": _num_bytes(client),
        "reading_bytes": _peak_bytes() - before,
    }
    with TrunkService(trunk, run) as service:
        remote = RemoteTrunk(
            LocalLink(service, service.admit("alice")), client, run, client="alice"
        )
        connect(client, remote)
        row |= _trained(run, client, remote)
    sender.send_bytes(json.dumps(row).encode())


def _trained(run: RunSpec, client: ClientPart, remote: RemoteTrunk) -> dict[str, float]:
    tokenizer = load_tokenizer(run.model.pretrained)
    training, held_out = hold_out(load_corpus(run.data), run.data.held_out, run.seed)
    sequences = tokenize(training, tokenizer, run.data)
    size, steps = run.train.batch_size, run.train.local_steps
    batches = list(
        training_batches(sequences, batch_size=size, num_batches=steps, seed=run.seed, start=0)
    )
    held = list(evaluation_batches(tokenize(held_out, tokenizer, run.data), size))
    trainer = ClientTrainer(client, remote, run)
    begun = time.perf_counter()
    with remote.session():
        losses = [trainer.step([batch]).loss for batch in batches]
    seconds = time.perf_counter() - begun
    found = trainer.evaluate(held[:_HELD_OUT_BATCHES])
    client.eval()  # type: ignore[no-untyped-call]
    prompt_BT = held[0].inputs["input_ids"][:1, :16]
    begun = time.perf_counter()
    writer: Any = client
    asked = dict.fromkeys(("max_new_tokens", "min_new_tokens"), _NEW_TOKENS)
    writer.generate(prompt_BT, do_sample=False, **asked)
    return {
        "loss": losses[-1],
        "held_out": found.nats / found.num_tokens,
        "trained_per_s": size * run.data.sequence_length * steps / seconds,
        "generated_per_s": _NEW_TOKENS / (time.perf_counter() - begun),
    }


def _num_bytes(part: nn.Module) -> int:
    """Return the bytes of a part's tensors with the statistics of quantized ones, each once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in part.state_dict().values()}
    return sum(held.values())


def _peak_bytes() -> int:
    """Return the largest number of bytes that this process has had in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux reports the peak of a process's memory")


@ending_with_its_reader()
def main() -> int:
    """Measure the model of the command line; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.memory", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="optimizer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and rows there")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        report = measure(arguments.folder, arguments.steps)
    except FedsplitError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(), indent=2), encoding="utf-8")
    return 0
