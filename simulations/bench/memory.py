"""The memory that activation checkpointing saves a trunk, and a client's memory.

*Measured* is the growth of a process that takes two training steps of a part. *Computed* is the
peak of the bytes of all live tensors; see `simulations/memory.py`.
"""

from dataclasses import dataclass, replace

from fedsplit.spec import DataSpec, ModelSpec, RunSpec, SplitSpec, TrainSpec
from fedsplit.telemetry.round import in_mib
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.report import Report, in_turns
from simulations.memory import computed, resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, and its batches as numbers of sequences and of tokens per sequence."""

    shape: Shape
    batches: tuple[tuple[int, int], ...]
    turns: int


SIZES = {
    "full": Size(shape=GPT2_SMALL, batches=((8, 256), (4, 128)), turns=3),
    "toy": Size(shape=TOY, batches=((2, 16),), turns=1),
}


def measure(size: str) -> Report:
    """Return the figures of a size; figures without a batch in their name are of its first one."""
    report, of = Report(), SIZES[size]
    for sequences, tokens in of.batches:
        run, batch = _run(of.shape, sequences, tokens), f"{sequences}x{tokens}"
        saved = {
            "checkpointing_memory_saved": _saved(report, run, of.turns, batch),
            "checkpointing_memory_saved_computed": _saved_computed(report, run, batch),
        }
        whole, client = (computed(run, part)["peak"] for part in ("whole", "client"))
        report.row("client", batch=batch, client=in_mib(client), whole=in_mib(whole))
        saved["client_peak_of_whole"] = client / whole
        is_first = (sequences, tokens) == of.batches[0]
        suffix = "" if is_first else f"_{batch}"
        report.figures |= {f"{name}{suffix}": value for name, value in saved.items()}
    return report


def _saved(report: Report, run: RunSpec, turns: int, batch: str) -> float:
    again = _checkpointed(run)
    peaks = in_turns(
        turns,
        {
            "kept": lambda: float(resident(run, "trunk")),
            "again": lambda: float(resident(again, "trunk")),
        },
        warm_up=False,
    )
    for name, values in peaks.items():
        report.spread("trunk, bytes measured", values, activations_are=name, batch=batch)
    return 1 - report.ratio("again / kept", peaks["again"], peaks["kept"], batch=batch)


def _saved_computed(report: Report, run: RunSpec, batch: str) -> float:
    kept, again = computed(run, "trunk"), computed(_checkpointed(run), "trunk")
    for name, sizes in (("kept", kept), ("again", again)):
        report.row("trunk, bytes computed", activations_are=name, batch=batch, **sizes)
    return 1 - again["peak"] / kept["peak"]


def _checkpointed(run: RunSpec) -> RunSpec:
    return replace(run, train=replace(run.train, checkpointing="trunk"))


def _run(shape: Shape, sequences: int, tokens: int) -> RunSpec:
    config = {
        "n_layer": shape.blocks,
        "n_embd": shape.hidden,
        "n_head": shape.heads,
        "vocab_size": shape.vocabulary,
        "n_positions": shape.tokens,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    return RunSpec(
        model=ModelSpec(config=config),
        split=SplitSpec.parse(shape.split),
        data=DataSpec(sequence_length=tokens),
        train=TrainSpec(batch_size=sequences),
    )
