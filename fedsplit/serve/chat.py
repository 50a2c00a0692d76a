"""Text generation with a split model on a terminal: completes a prompt, or holds a conversation.

Shapes: B sequences (always one), T tokens.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedTokenizerFast, TextStreamer

from fedsplit.data.hub import offline_reason, reporting_a_full_disk
from fedsplit.errors import CheckpointError, ConfigError, DataError, FedsplitError
from fedsplit.serve.client import Reached
from fedsplit.serve.reuse import CacheReuse, keep_first
from fedsplit.serve.template import conversation_text, end_tokens, positions_of

_LOOKUP_TOKENS = 10
"""Draft tokens in a pass if drafts come from the prompt."""


def draft_options(draft: str) -> dict[str, Any]:
    """The options of `generate` for drafts: `none`, `prompt`, or an assistant's directory.

    The client makes draft tokens, and the trunk verifies several of them in one pass. They do not
    change the generated tokens.

    Raises:
        CheckpointError: The assistant cannot be loaded.
        ConnectionLost: It is not in the hub's cache here, and the hub does not answer.
        StorageError: The disk of the hub's cache is full.
    """
    if draft in ("", "none"):
        return {}
    if draft == "prompt":
        return {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
    try:
        offline = bool(offline_reason(draft))
        with reporting_a_full_disk(draft):
            assistant = AutoModelForCausalLM.from_pretrained(
                draft, trust_remote_code=False, local_files_only=offline
            )
    # transformers raises ImportError for weights of a quantization that is not installed.
    except (OSError, ValueError, ImportError, CheckpointError) as exc:
        raise CheckpointError(
            f"--draft {draft} is neither `none`, `prompt` nor a model: {str(exc).splitlines()[0]}"
        ) from exc
    return {"assistant_model": assistant}


@dataclass(slots=True, kw_only=True, eq=False)
class Writer:
    """Writes generated text to `out`, token by token, and counts tokens and time.

    Attributes:
        reached: The model and the link to its trunk.
        tokenizer: The model's tokenizer.
        options: Options of `generate` in transformers.
        out: The file for the text.
    """

    reached: Reached
    tokenizer: PreTrainedTokenizerFast
    options: Mapping[str, Any]
    out: TextIO
    tokens: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def write(self, ids_BT: Tensor, cache: Cache | None = None, ends: Sequence[int] = ()) -> Tensor:
        """Continue from these tokens; return all tokens.

        Args:
            ids_BT: The tokens to continue from.
            cache: A KV cache, which may hold some of these tokens.
            ends: The tokens that end the text; by default those of the model.

        Raises:
            ConfigError: transformers refuses the options, alone or together.
            FedsplitError: The trunk refused, or could not be reached.
        """
        # With beams, the text is known only at the end, so it cannot be streamed.
        has_beams = self.options.get("num_beams", 1) > 1
        begin = time.monotonic()
        own: dict[str, Any] = {"streamer": None if has_beams else _TokenPrinter(self)}
        own |= {} if cache is None else {"past_key_values": cache}
        own |= {"eos_token_id": list(ends)} if ends else {}
        out_BT = self._generate(ids_BT, own)
        self.seconds += time.monotonic() - begin
        new_T = out_BT[0, ids_BT.shape[1] :]
        self.tokens += len(new_T)
        if has_beams:
            print(self.tokenizer.decode(new_T, skip_special_tokens=True), file=self.out)
        return out_BT

    def _generate(self, ids_BT: Tensor, own: Mapping[str, Any]) -> Tensor:
        model: Any = self.reached.model
        require_language_head(model)
        require_embedded(model, self.tokenizer, ids_BT[0].tolist())
        try:
            out_BT: Tensor = model.generate(
                ids_BT.to(model.device),
                attention_mask=torch.ones_like(ids_BT),
                pad_token_id=self.tokenizer.pad_token_id,
                **own,
                **self.options,
            )
        except FedsplitError:
            raise
        except ValueError as exc:
            raise ConfigError(f"cannot generate like this: {exc}") from exc
        except IndexError as exc:
            # On a CPU, a table of positions that has no row for a number.
            limit = positions_of(model.config) or "some"
            raise ConfigError(
                f"the text has {ids_BT.shape[1]} tokens and up to "
                f"{self.options.get('max_new_tokens', 0)} new ones, but the model has {limit} "
                "positions; shorten it, lower --max-new-tokens, or begin a new chat"
            ) from exc
        return out_BT.cpu()

    @property
    def summary(self) -> str:
        """Tokens, their rate, and bytes a token on the wire, with the bytes of the prompt."""
        link, tokens = self.reached.link, max(1, self.tokens)
        return (
            f"{self.tokens} tokens in {self.seconds:.2f} s "
            f"({self.tokens / max(self.seconds, 1e-9):.1f} tokens/s), {link.bytes_up // tokens} "
            f"bytes up and {link.bytes_down // tokens} down a token"
        )


class _TokenPrinter(TextStreamer):
    """Prints text as soon as its tokens make whole characters."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = writer.out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the text without delay."""
        print(text, end="\n" if stream_end else "", file=self._out, flush=True)


def require_language_head(model: Any) -> None:
    """Refuse a model that writes no text.

    Raises:
        ConfigError: It has no language head.
    """
    if not model.can_generate():
        raise ConfigError(f"a {model.family.__name__} writes no text; it has no language head")


def require_embedded(model: Any, tokenizer: PreTrainedTokenizerFast, ids_T: Sequence[int]) -> None:
    """Refuse tokens for which the model has no embedding.

    Raises:
        ConfigError: One of the tokens has none.
    """
    rows = model.config.get_text_config(decoder=True).vocab_size
    last = max(ids_T, default=0)
    if last >= rows:
        # A caller's number may be larger than any that a tokenizer takes.
        text = tokenizer.decode([last]) if last < len(tokenizer) else ""
        raise ConfigError(
            f"the text has the token {text!r} with number {last}, but "
            f"the model's embedding has {rows} rows (vocab_size); use the tokenizer that the "
            "model was saved with"
        )


def complete(writer: Writer, prompt: str) -> None:
    """Write the continuation of a prompt.

    Raises:
        ConfigError: The prompt has no tokens.
        FedsplitError: As in `Writer.write`.
    """
    _require_utf8(prompt)
    ids_BT = writer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids_BT.numel():
        raise ConfigError("the prompt is empty; say something for the model to go on from")
    writer.write(ids_BT.long())


def _require_utf8(text: str) -> None:
    """Refuse text with bytes that are not UTF-8, which Python decodes as surrogates.

    Raises:
        DataError: It has such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(
            f"the prompt is not UTF-8: its character {exc.start + 1} is the byte "
            f"0x{ord(text[exc.start]) & 0xFF:02x}; convert it, for example with iconv"
        ) from exc


class Conversation:
    """A conversation with one model and one KV cache: each turn sends its new tokens only.

    With a chat template of the tokenizer, there are turns of user and assistant, and a reply ends
    with the template's end-of-turn token; without one, the text continues line by line. If a
    template formats earlier turns in another way than before, the cache is cut to the tokens that
    both texts begin with; a cache that cannot be cut is replaced.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._turns: list[dict[str, Any]] = []
        self._prompt = self._reply = ""
        config = writer.reached.model.generation_config
        self._ends = end_tokens(writer.tokenizer, config, chat=True)
        self._reuse = CacheReuse(writer.reached.model.config)
        self._tokens_BT, self._cache = torch.zeros(1, 0, dtype=torch.long), self._new_cache()

    def answer(self, line: str) -> None:
        """Write the model's reply to a line.

        Raises:
            FedsplitError: As in `Writer.write`.
        """
        _require_utf8(line)
        tokenizer: Any = self._writer.tokenizer
        self._turns.append({"role": "user", "content": line})
        text = self._text()
        ids_BT = self._tokens(text)
        self._tokens_BT = self._writer.write(ids_BT, self._cache, self._ends)
        reply_T = self._tokens_BT[0, ids_BT.shape[1] :]
        self._prompt, self._reply = text, tokenizer.decode(reply_T, skip_special_tokens=True)
        self._turns.append({"role": "assistant", "content": self._reply})

    def _new_cache(self) -> Cache:
        return self._writer.reached.model.new_cache()

    def _text(self) -> str:
        """The text of all turns, for the model to continue."""
        tokenizer: Any = self._writer.tokenizer
        if not tokenizer.chat_template:
            line = self._turns[-1]["content"]
            return f"{self._prompt}{self._reply}\n{line}\n" if self._prompt else f"{line}\n"
        return conversation_text(tokenizer, self._turns)

    def _tokens(self, text: str) -> Tensor:
        """The text's tokens; those of earlier turns stay as they were generated."""
        tokenizer = self._writer.tokenizer
        # Decoding and encoding again may give other tokens, which the cache does not hold. A
        # template may also strip spaces from a reply.
        known = [self._prompt + reply for reply in (self._reply, self._reply.strip())]
        new = next((text[len(each) :] for each in known if text.startswith(each)), "")
        has_own = bool(tokenizer.chat_template or (new and self._tokens_BT.numel()))
        encoded = tokenizer(new or text, return_tensors="pt", add_special_tokens=not has_own)
        new_BT: Tensor = encoded["input_ids"].long()
        if not new:
            self._cut_cache(new_BT[0])
            return new_BT
        ends = new_BT[0, :1], self._tokens_BT[0, -1:]
        if torch.equal(*ends) and int(ends[0]) in self._ends:
            # The model has generated the end-of-turn token already.
            new_BT = new_BT[:, 1:]
        return torch.cat((self._tokens_BT, new_BT), dim=1)

    def _cut_cache(self, ids_T: Tensor) -> None:
        """Keep the first tokens of the cache that a text has too."""
        held: Any = self._cache.get_seq_length()
        common = self._reuse.common(self._tokens_BT[0, :held], ids_T)
        if common:
            keep_first(self._cache, common)
        else:
            self._cache = self._new_cache()


def converse(writer: Writer, lines: Iterable[str]) -> None:
    """Answer one line after another.

    Raises:
        FedsplitError: As in `Writer.write`.
    """
    conversation = Conversation(writer)
    for line in lines:
        if line.strip():
            conversation.answer(line)


def typed_lines(mark: str) -> Iterator[str]:
    """The lines of standard input until its end, after a `mark` each on a terminal."""
    while True:
        try:
            yield input(mark)
        except EOFError:
            return
        except UnicodeDecodeError as exc:
            raise DataError(f"the typed line is not UTF-8 ({exc}); convert it with iconv") from exc
