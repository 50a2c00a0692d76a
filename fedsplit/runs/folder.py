"""The folder that a run leaves behind: config, metrics, picture, checkpoint, snapshots.

`config.yaml` is written first, when the run begins; `metrics.jsonl` grows by a line a round, and
`snapshots/` by a folder where the run keeps them; the rest is there when the run is over.
Torch is imported by what writes a model or looks for snapshots, so that readers start at once.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsplit.errors import ConfigError
from fedsplit.runs import metrics
from fedsplit.runs.metrics import RoundStats
from fedsplit.spec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TokenizersBackend

    from fedsplit.data import Corpus
    from fedsplit.model import SplitModel


class RunFolder:
    """One run's folder.

    Args:
        path: The folder; `claim` and `begin` find one that no other run has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def claim(parent: Path, name: str) -> "RunFolder":
        """A new folder `name` in `parent`, or `name-2`, `name-3`, ...; for a run to begin in."""
        for folder in _candidates(parent, name):
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return RunFolder(folder.resolve())
        raise AssertionError("the candidates do not end")

    @staticmethod
    def begin(parent: Path, name: str, config: str) -> "RunFolder":
        """The folder that was claimed under this name, else a new one, with `config` in it."""
        for folder in _candidates(parent, name):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                # Exclusive, so that two runs cannot share a folder.
                with (folder / "config.yaml").open("x", encoding="utf-8") as file:
                    file.write(config)
                return RunFolder(folder.resolve())
        raise AssertionError("the candidates do not end")

    @staticmethod
    def to_resume(run: RunSpec) -> "RunFolder | None":
        """The folder that `run.resume` names; nothing for a run that begins anew.

        Raises:
            ConfigError: There is no such folder, nothing to go on from in it, or it is finished.
        """
        if not run.resume:
            return None
        if run.resume == "auto":
            there = itertools.takewhile(
                lambda path: path.exists(), _candidates(Path(run.launch.run_dir), run.name)
            )
            waiting = [folder for folder in map(RunFolder, there) if folder._can_go_on]
            return waiting[-1] if waiting else None
        folder = RunFolder(Path(run.resume).resolve())
        if not folder._can_go_on:
            found = "is finished" if (folder.path / "model").exists() else "has no snapshot"
            raise ConfigError(
                f"resume={run.resume}: {folder.path} {found}; name the folder of a run with "
                "train.save_every that was interrupted, or leave resume out to begin anew"
            )
        return folder

    @property
    def _can_go_on(self) -> bool:
        return bool(self._kept) and not (self.path / "model").exists()

    @property
    def _kept(self) -> dict[int, Path]:
        from fedsplit.runs.checkpoint import snapshots_in

        return snapshots_in(self.snapshots)

    @property
    def snapshots(self) -> Path:
        """Where the server's snapshots are."""
        return self.path / "snapshots"

    @property
    def last_snapshot(self) -> int:
        """The round that a resumed run goes on after."""
        return max(self._kept)

    @property
    def best(self) -> Path:
        """Where the best round so far is kept while the run lasts."""
        return self.path / "best"

    def forget_after(self, number: int) -> None:
        """Drop the rounds after `number`: a resumed run does them again."""
        kept = [stats for stats in self.rounds() if stats.round <= number]
        unfinished = self.path / "metrics.jsonl.tmp"
        unfinished.unlink(missing_ok=True)
        for stats in kept:
            metrics.append(unfinished, stats)
        unfinished.replace(self.path / "metrics.jsonl")

    def give_back(self) -> None:
        """Remove the folder if the run left nothing in it."""
        with suppress(OSError):
            self.path.rmdir()

    def append(self, stats: RoundStats) -> None:
        """Keep one round."""
        metrics.append(self.path / "metrics.jsonl", stats)

    def rounds(self) -> list[RoundStats]:
        """The rounds so far; a line that is being written does not count yet."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        text = file.read_text(encoding="utf-8")
        return metrics.parse(text[: text.rfind("\n") + 1].splitlines())

    def plot(self) -> None:
        """Draw `loss.png`: training loss and held-out bits per byte over rounds."""
        rounds = self.rounds()
        numbers = [stats.round for stats in rounds]
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        loss = figure.add_subplot()
        loss.plot(numbers, [s.loss for s in rounds], "o-", color="tab:blue", label="training loss")
        loss.set_xlabel("round")
        loss.set_ylabel("training loss (nats per token)", color="tab:blue")
        loss.xaxis.set_major_locator(MaxNLocator(integer=True))
        held_out = loss.twinx()
        measured = metrics.evaluated(rounds)
        is_text = all(math.isnan(s.accuracy) for s in measured)
        name, what = ("bits_per_byte", "bits per byte") if is_text else ("accuracy", "accuracy")
        points = [s.round for s in measured], [getattr(s, name) for s in measured]
        held_out.plot(*points, "s--", color="tab:orange")
        held_out.set_ylabel(f"held-out {what}", color="tab:orange")
        loss.set_title(f"{self.path.name}: {rounds[-1].version} trunk steps")
        figure.savefig(self.path / "loss.png", dpi=120)

    def keep(
        self,
        result: "SplitModel | PreTrainedModel",
        tokenizer: "TokenizersBackend | None",
        corpus: "Corpus",
        run: RunSpec,
    ) -> None:
        """Write what a finished run leaves.

        `model/` is the joined model, a plain Hugging Face checkpoint with tokenizer and card
        (adapters folded in, and by themselves in `adapter/`).
        """
        from fedsplit.model import SplitModel
        from fedsplit.model.checkpoint import join_checkpoint
        from fedsplit.model.lora import save_adapter
        from fedsplit.model.parts import folded_model
        from fedsplit.runs.model_card import model_card

        model = self.path / "model"
        if isinstance(result, SplitModel):
            join_checkpoint(result.client, result.trunk, model)
        else:
            folded_model(result).save_pretrained(model)
        if tokenizer:
            tokenizer.save_pretrained(model)
        trunk = result.trunk if isinstance(result, SplitModel) else result
        attention = trunk.config._attn_implementation or ""
        cut = _cut(result) if isinstance(result, SplitModel) else "not split"
        card = model_card(run, cut, attention, corpus, self.rounds())
        (model / "README.md").write_text(card, encoding="utf-8")
        if run.lora.enabled and isinstance(result, SplitModel):
            save_adapter(result.client, result.trunk, self.path / "adapter")
        self.plot()


def _cut(result: "SplitModel") -> str:
    """How many blocks bottom, trunk and top have."""
    blocks, num_blocks = result.client.trunk_blocks, result.client.plan.num_blocks
    return f"{blocks.start}/{len(blocks)}/{num_blocks - blocks.stop}"


def _candidates(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    for number in itertools.count(2):
        yield parent / f"{name}-{number}"
