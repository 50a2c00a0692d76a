"""Text out of a split model on a terminal: the rest of a prompt, or a conversation.

Shapes: B sequences (always one), T tokens.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedTokenizerFast, TextStreamer

from fedsplit.errors import CheckpointError, ConfigError, FedsplitError
from fedsplit.serve.client import Reached

_LOOKUP_TOKENS = 10
"""Draft tokens a pass when drafts come from the prompt."""


def draft_options(draft: str) -> dict[str, Any]:
    """What `generate` of transformers takes for drafts: `prompt`, or an assistant's directory.

    The draft's tokens are made here, and several of them verified in one pass of the trunk; they
    change nothing in what comes out.

    Raises:
        CheckpointError: The assistant cannot be loaded.
    """
    if not draft:
        return {}
    if draft == "prompt":
        return {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
    try:
        return {"assistant_model": AutoModelForCausalLM.from_pretrained(draft)}
    except (OSError, ValueError) as exc:
        raise CheckpointError(
            f"--draft {draft} is neither `prompt` nor a model: {str(exc).splitlines()[0]}"
        ) from exc


@dataclass(slots=True, kw_only=True, eq=False)
class Writer:
    """Writes what a model generates to `out`, as the tokens come, and counts what it took.

    Attributes:
        reached: The model, and the link to its trunk.
        tokenizer: The model's.
        options: For `generate` of transformers.
        out: Where text goes.
    """

    reached: Reached
    tokenizer: PreTrainedTokenizerFast
    options: Mapping[str, Any]
    out: TextIO
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def write(self, ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Go on from these tokens, of which the cache may know some; all tokens, new ones last.

        Raises:
            ConfigError: transformers refuses the options, alone or together.
            FedsplitError: The trunk refused, or could not be reached.
        """
        has_beams = self.options.get("num_beams", 1) > 1  # known only when all is over
        begin = time.monotonic()
        out_BT = self._generate(ids_BT, cache, None if has_beams else _Screen(self))
        self.seconds += time.monotonic() - begin
        new_T = out_BT[0, ids_BT.shape[1] :]
        self.tokens += len(new_T)
        if has_beams:
            print(self.tokenizer.decode(new_T, skip_special_tokens=True), file=self.out)
        return out_BT

    def _generate(self, ids_BT: Tensor, cache: Cache | None, screen: Any) -> Tensor:
        model: Any = self.reached.model
        if not model.can_generate():
            raise ConfigError(f"a {model.family.__name__} writes no text; it has no language head")
        kept = {} if cache is None else {"past_key_values": cache}
        try:
            out_BT: Tensor = model.generate(
                ids_BT.to(model.device),
                attention_mask=torch.ones_like(ids_BT),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=screen,
                **kept,
                **self.options,
            )
        except FedsplitError:
            raise
        except ValueError as exc:
            raise ConfigError(f"cannot generate like this: {exc}") from exc
        return out_BT.cpu()

    @property
    def summary(self) -> str:
        """Tokens, their rate, and bytes on the wire; a token's bytes include its prompt's."""
        link, tokens = self.reached.link, max(1, self.tokens)
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s "
            f"({self.tokens / max(self.seconds, 1e-9):.1f} tokens/s), {link.bytes_up // tokens} "
            f"bytes up and {link.bytes_down // tokens} down a token"
        )


class _Screen(TextStreamer):
    """Shows text as soon as it is certain which characters the tokens are."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = writer.out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write it out at once."""
        print(text, end="\n" if stream_end else "", file=self._out, flush=True)


def complete(writer: Writer, prompt: str) -> None:
    """Write how a text goes on.

    Raises:
        ConfigError: The prompt is no token at all.
        FedsplitError: As in `Writer.write`.
    """
    ids_BT = writer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids_BT.numel():
        raise ConfigError("the prompt is empty; say something for the model to go on from")
    writer.write(ids_BT.long())


class Conversation:
    """Turns with one model, whose caches stay: each turn only its new tokens cross the wire.

    With a chat template of the tokenizer's these are turns of user and assistant; without one the
    text simply goes on, line by line. Where a template writes earlier turns in another way than
    they were read, or said, before, everything is read once more.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._turns: list[dict[str, Any]] = []
        self._asked = self._said = ""
        self._held_BT, self._cache = self._nothing()

    def answer(self, line: str) -> None:
        """Write what the model says to a line.

        Raises:
            FedsplitError: As in `Writer.write`.
        """
        tokenizer: Any = self._writer.tokenizer
        self._turns.append({"role": "user", "content": line})
        text = self._text()
        ids_BT = self._tokens(text)
        self._held_BT = self._writer.write(ids_BT, self._cache)
        said_T = self._held_BT[0, ids_BT.shape[1] :]
        self._asked, self._said = text, tokenizer.decode(said_T, skip_special_tokens=True)
        self._turns.append({"role": "assistant", "content": self._said})

    def _nothing(self) -> tuple[Tensor, Cache]:
        """No tokens, and a cache that holds none."""
        return torch.zeros(1, 0, dtype=torch.long), self._writer.reached.model.new_cache()

    def _text(self) -> str:
        """All that the model is to read, from the first turn on."""
        tokenizer: Any = self._writer.tokenizer
        if not tokenizer.chat_template:
            line = self._turns[-1]["content"]
            return f"{self._asked}{self._said}\n{line}\n" if self._asked else f"{line}\n"
        text: str = tokenizer.apply_chat_template(
            self._turns, add_generation_prompt=True, tokenize=False
        )
        return text

    def _tokens(self, text: str) -> Tensor:
        """The text's tokens; those of what was said before stay as they were said."""
        tokenizer = self._writer.tokenizer
        known = [self._asked + said for said in (self._said, self._said.strip())]
        new = next((text[len(each) :] for each in known if text.startswith(each)), "")
        if not new:
            self._held_BT, self._cache = self._nothing()
            new = text
        has_own = bool(tokenizer.chat_template or self._held_BT.numel())
        encoded = tokenizer(new, return_tensors="pt", add_special_tokens=not has_own)
        new_BT = encoded["input_ids"].long()
        ends = new_BT[0, :1], self._held_BT[0, -1:]
        if torch.equal(*ends) and int(ends[0]) in tokenizer.all_special_ids:
            new_BT = new_BT[:, 1:]  # the model has ended its turn itself
        return torch.cat((self._held_BT, new_BT), dim=1)


def converse(writer: Writer, lines: Iterable[str]) -> None:
    """Answer line after line.

    Raises:
        FedsplitError: As in `Writer.write`.
    """
    conversation = Conversation(writer)
    for line in lines:
        if line.strip():
            conversation.answer(line)


def typed_lines(mark: str) -> Iterator[str]:
    """What a person types after a `mark`, or a pipe brings, until its end."""
    while True:
        try:
            yield input(mark)
        except EOFError:
            return
