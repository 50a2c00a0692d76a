"""The shell and Python blocks of the pages, and what a comment above a block says about it.

A block without a comment is run as it stands. Above any other block is one of

    <!-- needs: WORD -->               what is not available here, a key of `NEEDS`
    <!-- run by: tests/a.py, ... -->   the tests that run such commands
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.house.source import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NEEDS = {
    "docker": "a daemon of Docker",
    "gpu": "a GPU",
    "kubernetes": "a cluster",
    "machines": "several machines, or the id of a run on them",
    "network": "a download, or the installation of packages",
    "slurm": "a cluster with SLURM",
    "systemd": "systemd as the first process, and root",
}
# What makes a command quick without changing what it is; later settings win over those of a page.
TOY = {
    "simulations.run": "train.rounds=1 train.local_steps=1 data.held_out=0.01",
    "simulations.parity": "steps=2",
    "simulations.families": "gpt2",
    "simulations.one_step": "",
    "simulations.accounting": "",
    "simulations.dashboards": "",
}
SHELL = {"grep", "id=$(grep"}
COMMENT = r"<!-- (?:needs|run by): .*? -->"
_BLOCK = re.compile(
    rf"^(?:({COMMENT})\n)?```(sh|bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
_PROGRAM = re.compile(r"(python|fedsplit|flwr|flower-\w+) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of a page.

    Attributes:
        page: The page, relative to the checkout.
        line: The line of its fence.
        is_python: Whether it is Python, and not the shell's.
        text: Its text.
        needs: What it needs that is not available here, if anything.
        run_by: The files of the tests that run such commands.
    """

    page: str
    line: int
    is_python: bool
    text: str
    needs: str = ""
    run_by: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether it is run as it stands."""
        return not self.needs and not self.run_by

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """The commands of a block of the shell, as they are typed."""
        typed = self.text.replace("\\\n", " ").splitlines()
        return [line for line in typed if line.strip() and not line.startswith("#")]

    @property
    def programs(self) -> list[list[str]]:
        """The words of the commands that start a program of ours or of Flower's."""
        if self.is_python:
            return []
        return [shlex.split(line, comments=True) for line in self.lines if _PROGRAM.match(line)]


def blocks_of(page: Path) -> list[Block]:
    """All shell and Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [_block(page, text, match) for match in _BLOCK.finditer(text)]


def _block(page: Path, text: str, match: re.Match[str]) -> Block:
    comment, language, inside = match.groups()
    kind, _, said = (comment or "").removeprefix("<!-- ").removesuffix(" -->").partition(": ")
    return Block(
        page=page.relative_to(ROOT).as_posix(),
        line=text.count("\n", 0, match.start(2)) + 1,
        is_python=language == "python",
        text=inside,
        needs=said if kind == "needs" else "",
        run_by=tuple(said.split(", ")) if kind == "run by" else (),
    )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# --- what to do with a block --------------------------------------------------------------------


def experiment_of(words: list[str]) -> str:
    """The experiment that a command names, or nothing."""
    return next((m[1] for word in words if (m := re.fullmatch(r"experiment=(\w+)", word))), "")


def two_of(words: list[str]) -> list[str]:
    """A command's words, in which only the first setting that is swept has two values."""
    swept = [word for word in words if re.fullmatch(r"[\w.]+=\w+(,\w+)+", word)]
    short = {word: word.split(",")[0] for word in swept[1:]}
    return [short.get(word, word) for word in words]


def toy(module: str, words: list[str]) -> list[str]:
    """The arguments of a module, made quick."""
    added = shlex.split(TOY.get(module, ""))
    if module == "simulations.run":
        words = two_of(words)
        if not experiment_of(words):
            words = ["experiment=toy", *words]
    end = words.index("2>") if "2>" in words else len(words)
    return [*words[:end], *added, *words[end:]]


def task_of(line: str) -> list[str]:
    """What `run_blocks` should do with a line of the shell."""
    words = shlex.split(line, comments=True)
    match words:
        case ["python", "-m", module, *rest] if module in TOY:
            return [module, *toy(module, rest)]
        case ["fedsplit", "serve", *rest]:
            return ["serve", *rest]
        case ["fedsplit", *rest]:
            return ["fedsplit", *rest]
        case [program, *_] if program in SHELL:
            return ["sh", line]
    raise ValueError(line)


def tasks_of(block: Block) -> Iterator[list[str]]:
    """What `run_blocks` should do with a block; lines of the shell that follow one another are one.

    Raises:
        ValueError: It cannot run a line, which is the error's text.
    """
    if block.is_python:
        yield ["python", block.text]
        return
    found: list[list[str]] = []
    for task in map(task_of, block.lines):
        if task[0] == "sh" and found and found[-1][0] == "sh":
            found[-1][1] += f"\n{task[1]}"
        else:
            found.append(task)
    yield from found


def subject_of(words: list[str]) -> str:
    """The word of a command that a test of it must have."""
    match words:
        case ["python", "-m", "simulations.bench", bench, *_]:
            return bench
        case ["python", "-m", "simulations.run" as module, *rest]:
            plugins = [word for word in rest if word.startswith("hydra/")]
            return plugins[0].partition("=")[2] if plugins else experiment_of(rest) or module
        case ["python", "-m", module, *_]:
            return module.rpartition(".")[2]
        case ["fedsplit", command, *_]:
            return command
    return words[0]
