"""The commands `generate` and `chat`: text generation on a terminal with a trunk server."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from click import UsageError

from fedsplit.cli.command import CLIENT_OPTIONS, naming, quiet
from fedsplit.cli.reaching import Reaching
from fedsplit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TokenizersBackend

    from fedsplit.serve.chat import Writer
    from fedsplit.serve.client import Reached

Draft = Annotated[
    str,
    typer.Option(
        metavar="none|prompt|DIR",
        help="no drafts, those of prompt lookup, or of a small model; default as many as pay",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="maximum number of new tokens")]
Sample = Annotated[bool, typer.Option("--sample", help="sample tokens; default the most likely")]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="X", help="flatten (above 1) or sharpen the distribution; samples"),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="sample from the most likely tokens of this total probability"),
]
TopK = Annotated[
    int | None, typer.Option(metavar="X", help="sample from this many most likely tokens")
]
Seed = Annotated[int, typer.Option(metavar="N", help="seed of sampling", min=0, max=(1 << 64) - 1)]
Noise = Annotated[
    float,
    typer.Option(metavar="Z", help="noise on what is sent, in radii of public text", min=0.0),
]
StateDir = Annotated[
    str, typer.Option(metavar="DIR", help="folder of the noise key and the ledger, with --noise")
]
Public = Annotated[
    str, typer.Option(metavar="FILE", help="public text, with --noise; default random tokens")
]
Beams = Annotated[int, typer.Option(metavar="N", help="number of beams for beam search")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompting(Reaching):
    """The options of a prompt on the terminal: the decoding of tokens, and noise."""

    draft: Draft = ""
    max_new_tokens: MaxNewTokens = 128
    sample: Sample = False
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = 0
    noise: Noise = 0.0
    state_dir: StateDir = ""
    public: Public = ""

    def __post_init__(self) -> None:
        # Without arguments, `super` finds no class in one that dataclass has made anew for slots.
        super(_Prompting, self).__post_init__()
        if bool(self.noise) != bool(self.state_dir):
            raise UsageError("--noise and --state-dir go together; give both or neither")

    @contextmanager
    def _writer(self, *, beams: int = 1) -> "Iterator[Writer]":
        """Open a writer to the terminal; print a summary on stderr at the end."""
        quiet()
        import torch

        from fedsplit.serve.chat import Writer

        options = self._decoding(beams)
        torch.manual_seed(self.seed)
        with self.reached() as (reached, tokenizer, _):
            options |= self._drafts(reached, options)
            writer = Writer(reached=reached, tokenizer=tokenizer, options=options, out=sys.stdout)
            with self._shielded(reached, tokenizer):
                yield writer
            print(writer.summary, file=sys.stderr)

    @contextmanager
    def _shielded(self, reached: "Reached", tokenizer: "TokenizersBackend") -> Iterator[None]:
        """A context with the noise that was asked for; print at its end what it has told."""
        from fedsplit.serve.client import shielded

        if not self.noise:
            yield
            return
        folder = Path(self.state_dir)
        with shielded(reached, self.noise, folder, self.public, tokenizer) as ledger:
            yield
            print(f"told the server, at most: {ledger.spent('rows')}", file=sys.stderr)

    def _drafts(self, reached: "Reached", options: dict[str, Any]) -> dict[str, Any]:
        """Return the option of `generate` for drafts by default, where they change nothing else."""
        # A seed would give other samples, and every draft would tell the server a row.
        is_greedy = not options["do_sample"] and options["num_beams"] == 1
        drafts = reached.drafts() if is_greedy and not self.draft and not self.noise else None
        return {"assistant_model": drafts} if drafts else {}

    def _decoding(self, beams: int) -> dict[str, Any]:
        """Return the decoding options for the `generate` of transformers."""
        from fedsplit.serve.chat import draft_options

        if beams > 1 and self.draft not in ("", "none"):
            raise ConfigError("--beams and --draft do not go together; leave one of them out")
        numbers = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {name: value for name, value in numbers.items() if value is not None}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample or bool(chosen),
            "num_beams": beams,
            **chosen,
            **draft_options(self.draft),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate(_Prompting):
    """Complete a prompt, and print each token at once."""

    example: ClassVar[str] = '--trunk 127.0.0.1:9500 --model gpt2 "Once upon a time"'

    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="the text to complete")]
    beams: Beams = 1

    def run(self) -> None:
        """Print the completion of the prompt."""
        with naming(CLIENT_OPTIONS), self._writer(beams=self.beams) as writer:
            from fedsplit.serve.chat import complete

            complete(writer, self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(_Prompting):
    """Chat with a model; Ctrl-D ends the chat."""

    example: ClassVar[str] = "--trunk 127.0.0.1:9500 --model gpt2"

    def run(self) -> None:
        """Answer each line of stdin."""
        with naming(CLIENT_OPTIONS), self._writer() as writer:
            from fedsplit.serve.chat import converse, typed_lines

            is_typed = sys.stdin.isatty()
            if is_typed:
                print("type a line, or Ctrl-D to end the chat", file=sys.stderr)
            converse(writer, typed_lines("> " if is_typed else ""))
