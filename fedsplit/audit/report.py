"""The report of an audit: its table as text, JSON, Markdown and a picture, and the controls."""

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedsplit import atomic
from fedsplit.audit.scene import Scene
from fedsplit.audit.table import KNOWN_TEXT, Auditor, Cell, defences
from fedsplit.console import table_text
from fedsplit.errors import DataError
from fedsplit.runs.folder import RunFolder

NO_TRUNK = "no trunk at all"
"""The row that decides: what the client's blocks alone are worth, from which nothing leaves."""

_ATTACKS = ("text", "text, linear", KNOWN_TEXT, "labels", "words", "generation")
_WORKS = 0.99
"""What the attacks must read without a defence, or the instrument is broken."""

_MARGIN = 0.02
"""How far above chance the negative control may be."""

_QUICK, _FULL = (4, 16), (8, 32)
"""Private sequences, and the tokens of each."""


@dataclass(slots=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        cells: A cell for each defence and attack that applies.
        losses: The held-out loss under each defence, in nats per token, without any adaptation.
        census: The attack that covers each tensor that left in a step, by message.
        negative: What the search reads of the private text in rows of another text.
        chance: What a constant guess gets right.
        seconds: The time that it took.
    """

    cells: list[Cell] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    census: dict[str, str] = field(default_factory=dict)
    negative: float = 0.0
    chance: float = 0.0
    seconds: float = 0.0

    def value(self, defence: str, attack: str) -> float:
        """Return what an attack recovers; NaN where it has nothing to attack."""
        found = (c.value for c in self.cells if (c.defence, c.attack) == (defence, attack))
        return next(found, math.nan)

    @property
    def leak(self) -> str:
        """The line beside the loss of a run: what a server reads without a defence."""
        values = {name: self.value("off", name) for name in ("text", "labels", "words")}
        shown = (f"{name} {value:.0%}" for name, value in values.items() if not math.isnan(value))
        return "leak  " + "  ".join(shown)

    @property
    def broken(self) -> str:
        """Why the controls say that the instrument is broken; empty if they do not."""
        # A run whose trunk takes no steps sends no gradient, so there is nothing to attack.
        for attack in ("text", *({"labels"} & {cell.attack for cell in self.cells})):
            if not self.value("off", attack) >= _WORKS:
                return (
                    f"without a defence, the attack on the {attack} recovers "
                    f"{self.value('off', attack):.1%} and must recover {_WORKS:.0%}"
                )
        if self.negative > self.chance + _MARGIN:
            return (
                f"in rows of another text, {self.negative:.1%} of the private text is found, and "
                f"chance is {self.chance:.1%}"
            )
        return ""

    def table(self) -> list[Sequence[str]]:
        """Return the cells of the table: a line for each defence, below the heads."""
        heads = ("defence", *_ATTACKS, "held-out loss")
        lines = [
            (name, *(_percent(self.value(name, each)) for each in _ATTACKS), f"{loss:.3f}")
            for name, loss in self.losses.items()
        ]
        return [heads, *lines]

    def __str__(self) -> str:
        """The table, the census and the controls."""
        return "\n\n".join(
            (
                table_text(self.table(), right=range(1, len(_ATTACKS) + 2)),
                table_text([("left the client in a step", "read by"), *self.census.items()]),
                f"chance {self.chance:.1%}, rows of another text {self.negative:.1%}",
                self.leak,
            )
        )

    @property
    def markdown(self) -> str:
        """The table for a page or a model card."""
        heads, *lines = self.table()
        rule = ("---", *("---:" for _ in heads[1:]))
        text = "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
        return (
            "The share of the tokens that an honest but curious server recovers. The server knows "
            "the client weights. The loss is in nats per token, of the same weights under each "
            f"defence.\n\n{text}\n"
        )

    def add_to_card(self, card: Path) -> None:
        """Add the table to the model card of a run."""
        text = card.read_text(encoding="utf-8").rstrip()
        atomic.write_text(card, f"{text}\n\n## Measured\n\n{self.markdown}\n`{self.leak}`\n")

    def write(self, folder: Path) -> None:
        """Write `table.json`, `audit.md` and `audit.png` into a folder."""
        atomic.make_folder(folder)
        told = asdict(self)
        atomic.write_text(folder / "table.json", json.dumps(told, indent=2) + "\n")
        atomic.write_text(folder / "audit.md", self.markdown)
        with atomic.new_file(folder / "audit.png") as file:
            file.write_bytes(self._picture())

    def _picture(self) -> bytes:
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for attack in ("text", "labels"):
            known = [n for n in self.losses if math.isfinite(self.value(n, attack))]
            x = [100 * self.value(name, attack) for name in known]
            axes.scatter(x, [self.losses[name] for name in known], label=attack)
        for name, loss in self.losses.items():
            if math.isfinite(value := self.value(name, "text")):
                axes.annotate(name, (100 * value, loss), fontsize=7)
        axes.axvline(100 * self.chance, color="0.6", linestyle=":", label="chance")
        axes.axhline(self.losses[NO_TRUNK], color="0.6", linestyle="--", label=NO_TRUNK)
        axes.set_xlabel("tokens recovered by the server (%)")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.legend()
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        return png.getvalue()


def audit(
    folder: RunFolder, *, public: str = "", quick: bool = False, noise: Sequence[float] = ()
) -> Audit:
    """Attack a finished run, and return what a server reads of it.

    Args:
        folder: The run's folder.
        public: A file of public text; by default the text that the run trained on.
        quick: Whether a smaller sample is enough.
        noise: The sizes of noise, in units of the public radius.

    Raises:
        DataError: The controls say that the instrument is broken.
    """
    return audit_scene(Scene.of_run(folder, *sample_of(quick), public=public), noise)


def sample_of(quick: bool) -> tuple[int, int]:
    """Return the private sequences of an audit, and the tokens of each."""
    return _QUICK if quick else _FULL


def audit_scene(scene: Scene, noise: Sequence[float]) -> Audit:
    """Attack a scene, and return what a server reads of it.

    Args:
        scene: The run or the model, as its server sees it.
        noise: The sizes of noise, in units of the public radius.

    Raises:
        DataError: The controls say that the instrument is broken.
    """
    begin = time.monotonic()
    auditor = Auditor(scene)
    found = Audit(chance=scene.most_frequent, census=auditor.census())
    found.negative = auditor.negative()
    for defence in defences(noise, scene.trunk_blocks):
        cells, found.losses[defence.name] = auditor.cells(defence)
        found.cells += cells
    found.losses[NO_TRUNK] = _loss_without_trunk(scene)
    found.seconds = time.monotonic() - begin
    if found.broken:
        raise DataError(f"the instrument is broken: {found.broken}; no table is written")
    return found


@torch.no_grad()
def _loss_without_trunk(scene: Scene) -> float:
    ids_BT = scene.private_BT
    return float(scene.ends()(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"
