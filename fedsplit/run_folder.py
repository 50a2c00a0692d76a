"""The folder that a run leaves behind: config, metrics, picture, checkpoint, state.

`config.yaml` is written first, when the run begins; `metrics.jsonl` grows by a line a round; the
rest is there when the run is over.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors.torch import save_file
from torch import Tensor
from transformers import TokenizersBackend

from fedsplit import metrics
from fedsplit.card import model_card
from fedsplit.data import Corpus
from fedsplit.metrics import RoundStats
from fedsplit.model import SplitModel
from fedsplit.model.checkpoint import join_checkpoint
from fedsplit.model.lora import save_adapter, trainable
from fedsplit.spec import RunSpec


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
        held_out.plot(numbers, [s.bits_per_byte for s in rounds], "s--", color="tab:orange")
        held_out.set_ylabel("held-out bits per byte", color="tab:orange")
        loss.set_title(f"{self.path.name}: {rounds[-1].version} trunk steps")
        figure.savefig(self.path / "loss.png", dpi=120)

    def keep(
        self,
        parts: SplitModel,
        tokenizer: TokenizersBackend,
        corpus: Corpus,
        run: RunSpec,
        moments: dict[str, Tensor],
    ) -> None:
        """Write what a finished run leaves.

        `model/` is the joined model, a plain Hugging Face checkpoint with tokenizer and card
        (adapters folded in, and by themselves in `adapter/`); `state/` holds each side's trained
        tensors and the trunk optimizer's `moments`.
        """
        model, state = self.path / "model", self.path / "state"
        join_checkpoint(parts.client, parts.trunk, model)
        tokenizer.save_pretrained(model)
        blocks, num_blocks = parts.client.trunk_blocks, parts.client.plan.num_blocks
        card = model_card(run, blocks, num_blocks, corpus, self.rounds())
        (model / "README.md").write_text(card, encoding="utf-8")
        if run.lora.enabled:
            save_adapter(parts.client, parts.trunk, self.path / "adapter")
        state.mkdir(exist_ok=True)
        for name, tensors in (
            ("halves", trainable(parts.client)),
            ("trunk", trainable(parts.trunk)),
            ("trunk_moments", moments),
        ):
            kept = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(kept, state / f"{name}.safetensors", metadata={"config": run.fingerprint})
        self.plot()


def _candidates(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    for number in itertools.count(2):
        yield parent / f"{name}-{number}"
