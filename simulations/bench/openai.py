"""The OpenAI-compatible server: its speed against `fedsplit generate`, and chats at once.

The model is a GPT-2 with random weights and a vocabulary of words. Three processes on loopback
have one thread of torch each: the trunk's server, the client with the HTTP server in front of it,
and this one, which asks over HTTP and reads answers piece by piece.
"""

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsplit.data import load_tokenizer
from fedsplit.openai.server import Binding, serving
from fedsplit.serve import Served, hosted, reach
from fedsplit.serve.chat import Writer
from fedsplit.spec import WireSpec
from fedsplit.telemetry.sinks import SILENT
from simulations.bench.models import GPT2_SMALL, TOY, Shape
from simulations.bench.processes import Answers, process
from simulations.bench.report import Report, in_turns

_MODEL = "bench"
_CHATS = 8
_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The model, the words of a prompt, the tokens of an answer, and the turns."""

    shape: Shape
    prompt: int
    new_tokens: int
    turns: int


SIZES = {
    "full": Size(shape=GPT2_SMALL, prompt=32, new_tokens=64, turns=5),
    "toy": Size(shape=TOY, prompt=8, new_tokens=8, turns=1),
}


def measure(size: str) -> Report:
    """Fill a report with the figures of the server; `size` is `full` or `toy`."""
    report, sizes = Report(), SIZES[size]
    with TemporaryDirectory() as folder:
        _save(sizes.shape, Path(folder))
        with (
            process(trunk_server, sizes.shape, folder) as server,
            process(front, folder, server.ask("address"), sizes.new_tokens) as client,
            httpx.Client(base_url=client.ask("url"), timeout=_TIMEOUT_S) as http,
        ):
            # Each begins with another word, so that no two of them have the same text.
            chats = [_words(number, sizes) for number in range(1, 1 + _CHATS)]
            found = in_turns(
                sizes.turns,
                {
                    "http": lambda: _rate(http, chats[:1], sizes, at_once=1),
                    "generate": lambda: client.ask("generate", chats[0]),
                    "chats_in_turn": lambda: _rate(http, chats, sizes, at_once=1),
                    "chats_at_once": lambda: _rate(http, chats, sizes, at_once=_CHATS),
                },
            )
    for name, values in found.items():
        report.spread("tokens_per_s", values, by=name)
    report.figures["http_vs_generate"] = report.ratio(
        "http / generate", found["http"], found["generate"]
    )
    report.figures["chats8_gain"] = report.ratio(
        "chats at once / in turn", found["chats_at_once"], found["chats_in_turn"]
    )
    return report


# --- the processes --------------------------------------------------------------------------------


@contextmanager
def trunk_server(shape: Shape, folder: str) -> Iterator[Answers]:
    """Serve the trunk of the model in a folder; answers its `address`."""
    served = [Served(name=_MODEL, model=folder)]
    with hosted(served, shape.run, WireSpec(bind="127.0.0.1:0")) as address:
        yield {"address": lambda: address}


@contextmanager
def front(folder: str, trunk: str, new_tokens: int) -> Iterator[Answers]:
    """Serve the model over HTTP; answers the `url`, and `generate` as the command does.

    `generate` returns tokens per second.
    """
    tokenizer = load_tokenizer(folder)
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    with reach(folder, trunk) as alone, reach(folder, trunk) as reached:
        writer = Writer(reached=alone, tokenizer=tokenizer, options=options, out=io.StringIO())

        def generate(prompt: str) -> float:
            began = time.perf_counter()
            ids_BT = tokenizer(prompt, return_tensors="pt")["input_ids"]
            out_BT = writer.write(ids_BT)
            alone.trunk.end_generations()
            tokens: int = out_BT.shape[1] - ids_BT.shape[1]
            return tokens / (time.perf_counter() - began)

        with serving(
            reached,
            tokenizer,
            Binding(address="127.0.0.1:0"),
            model=_MODEL,
            max_requests=_CHATS,
            cache_bytes=0,
            telemetry=SILENT,
            metrics=None,
        ) as address:
            yield {"url": lambda: f"http://{address}", "generate": generate}


def _save(shape: Shape, folder: Path) -> None:
    """Save the model, with a tokenizer that has a word for each of its tokens."""
    torch.set_num_threads(1)
    shape.whole().save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(shape.vocabulary)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w0", pad_token="w0"
    )
    wrapped.chat_template = _TEMPLATE
    wrapped.save_pretrained(folder)


# --- a client over HTTP ---------------------------------------------------------------------------


def _words(first: int, size: Size) -> str:
    return " ".join(f"w{first + number}" for number in range(size.prompt))


def _rate(http: httpx.Client, prompts: list[str], size: Size, *, at_once: int) -> float:
    """Return the tokens per second of all answers, of which some are asked for at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        tokens = sum(pool.map(lambda prompt: _asked(http, prompt, size), prompts))
    return tokens / (time.perf_counter() - began)


def _asked(http: httpx.Client, prompt: str, size: Size) -> int:
    """Read the streamed answer to a prompt; return its number of tokens."""
    body = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": size.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            text = line.removeprefix("data: ")
            if text not in ("", "[DONE]"):
                tokens = (json.loads(text)["usage"] or {}).get("completion_tokens", 0)
    return tokens
