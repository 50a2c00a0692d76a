"""The commands serve, generate and chat: their options, and what they put together of them."""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import ConfigError
from fedsplit.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    from fedsplit.prompting import Writer
    from fedsplit.serving import Served

Add = Callable[[str, Callable[[argparse.Namespace], None], str, str], argparse.ArgumentParser]
"""Adds a command: its name, what runs it, a summary, and an example's arguments."""

_TOKEN = "FEDSPLIT_TOKEN"
_TRY = '"Once upon a time"'
_SERVER_OPTIONS = (
    ("--split", "1/2/1", "blocks of bottom/trunk/top; default 1/*/1"),
    ("--bind", "ADDRESS", "host:port or unix:path; default 127.0.0.1:9500, for a run a free port"),
    ("--advertise", "HOST:PORT", "what clients are told, if they call another address"),
    ("--tls-cert", "FILE", "PEM of the server's certificate chain"),
    ("--tls-key", "FILE", "PEM of its key"),
)
_CLIENT_OPTIONS = (
    ("--trunk", "ADDRESS", "of the trunk server; default 127.0.0.1:9500, for a run where it is"),
    ("--served", "NAME", "of the trunk, where a server has several; default its first"),
    ("--adapter", "DIR", "the peft adapter that this trunk is served with"),
    ("--tls-ca", "FILE", "PEM of the authority to trust, where the server has TLS"),
    ("--draft", "prompt|DIR", "take drafts from the prompt, or from a small model: fewer trips"),
)
_NUMBERS = {
    "--temperature": (float, "flatten (above 1) or sharpen the choice; samples"),
    "--top-p": (float, "choose among the likeliest tokens of this probability; samples"),
    "--top-k": (int, "choose among this many tokens; samples"),
}
_CHOOSING = ("temperature", "top_p", "top_k")


def add_commands(add: Add) -> None:
    """Add the three commands to the parser."""
    serve = add(
        "serve",
        _serve,
        "serve the trunk of a model, or of a finished run, to generate and to train",
        "--model gpt2 --split 1/10/1 (or: fedsplit serve runs/default)",
    )
    words = "the folder of a finished run, and field=value for budgets and training"
    serve.add_argument("words", nargs="*", metavar="RUN_DIR | OVERRIDE", help=words)
    models = "directory or hub id of a whole model; several to serve several"
    serve.add_argument("--model", action="append", default=[], metavar="[NAME=]DIR", help=models)
    adapters = "peft adapter on the first model; with a name, served beside it"
    serve.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR", help=adapters
    )
    for option, metavar, text in _SERVER_OPTIONS:
        serve.add_argument(option, default="", metavar=metavar, help=text)
    serve.add_argument("--insecure", action="store_true", help="no TLS, and I mean it")
    _add_common(serve, "of torch; several, cuda:0,cuda:1, or auto for all GPUs; default cpu")
    example = '--trunk 127.0.0.1:9500 --model gpt2 "Once upon a time"'
    generate = add("generate", _generate, "go on from a prompt, as the tokens come", example)
    generate.add_argument("prompt", metavar="PROMPT", help="what to go on from")
    generate.add_argument("--beams", type=int, default=1, metavar="N", help="beam search")
    example = "--trunk 127.0.0.1:9500 --model gpt2"
    chat = add("chat", _chat, "converse with a model; Ctrl-D ends", example)
    chat.set_defaults(beams=1)
    for command in (generate, chat):
        _add_client(command)


def _add_client(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", default="", metavar="DIR", help="the whole model, or its hub id")
    source.add_argument("--run", default="", metavar="RUN_DIR", help="the folder of a finished run")
    for option, metavar, text in _CLIENT_OPTIONS:
        command.add_argument(option, default="", metavar=metavar, help=text)
    most = "new tokens at most; default 128"
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help=most)
    command.add_argument("--sample", action="store_true", help="draw tokens; default the likeliest")
    for option, (kind, text) in _NUMBERS.items():
        command.add_argument(option, type=kind, metavar="X", help=text)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")
    caches = "who keeps the trunk's keys and values; default server"
    command.add_argument("--kv", choices=("server", "client"), default="server", help=caches)
    kinds = ("float32", "bfloat16")
    dtype = "of a --model, as at the server; default float32"
    command.add_argument("--dtype", choices=kinds, default="", help=dtype)
    _add_common(command, "of torch; default cpu")


def _add_common(command: argparse.ArgumentParser, devices: str) -> None:
    text = f"file with the server's token; default {_TOKEN} of the environment, if it is set"
    command.add_argument("--token-file", default="", metavar="FILE", help=text)
    command.add_argument("--revision", default="main", metavar="R", help="of hub ids; default main")
    command.add_argument("--device", default="cpu", metavar="NAME", help=devices)


# --- serve ------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> None:
    _quiet()
    from fedsplit.runs.folder import RunFolder
    from fedsplit.serving import ADDRESS, hosted, plain_name, plan

    folders = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if arguments.split:
        overrides.insert(0, f"split={arguments.split}")
    if len(folders) + bool(arguments.model) > 1:
        raise ConfigError(f"serve either {folders[0]} or something else; not both at once")
    finished = RunFolder.finished(folders[0]) if folders else None
    if finished:
        served = plan([f"{plain_name(folders[0])}={finished.model}"], arguments.adapter)
    else:
        served = plan(arguments.model, arguments.adapter, arguments.revision)
    run = _run(finished.run if finished else None, overrides)
    wire = replace(
        run.wire,
        bind=arguments.bind or ("127.0.0.1:0" if finished else ADDRESS),
        **{name: getattr(arguments, name) for name in ("advertise", "tls_cert", "tls_key")},
        insecure=arguments.insecure,
    )
    with ExitStack() as opened:
        hosting = hosted(served, run, wire, token=_token(arguments), device=arguments.device)
        address = opened.enter_context(hosting)
        told = _told_to_stop()
        if finished:
            opened.enter_context(finished.announced(address))
        source = ["--run", folders[0]] if finished else ["--trunk", address, *_model_of(served[0])]
        print(_ready_line(served, run, address, [*source, *_secrets(arguments)]), flush=True)
        told.wait()


def _run(finished: RunSpec | None, overrides: Sequence[str]) -> RunSpec:
    from fedsplit.config import changed, compose

    return changed(finished, overrides) if finished else compose(overrides)


def _ready_line(
    served: "Sequence[Served]", run: RunSpec, address: str, options: Sequence[str]
) -> str:
    names = ", ".join(each.name for each in served)
    return (
        f"serving {names} (cut {run.split}) at {address}; try: "
        f"fedsplit generate {shlex.join(options)} {_TRY}"
    )


def _model_of(served: "Served") -> list[str]:
    adapter = ["--adapter", served.adapter] if served.adapter else []
    return ["--model", served.model, *adapter]


def _secrets(arguments: argparse.Namespace) -> list[str]:
    trust = ["--tls-ca", arguments.tls_cert] if arguments.tls_cert else []
    return [*trust, *(["--token-file", arguments.token_file] if arguments.token_file else [])]


def _told_to_stop() -> threading.Event:
    """Set when the process is asked to end, from now on."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    return told


# --- generate and chat ------------------------------------------------------------------------


def _generate(arguments: argparse.Namespace) -> None:
    with _writer(arguments) as writer:
        from fedsplit.prompting import complete

        complete(writer, arguments.prompt)


def _chat(arguments: argparse.Namespace) -> None:
    with _writer(arguments) as writer:
        from fedsplit.prompting import converse, typed_lines

        converse(writer, typed_lines("> " if sys.stdin.isatty() else ""))


@contextmanager
def _writer(arguments: argparse.Namespace) -> "Iterator[Writer]":
    """What writes at the terminal; at the end it says what that took, on stderr."""
    _quiet()
    import torch

    from fedsplit.data import load_tokenizer
    from fedsplit.prompting import Writer
    from fedsplit.runs.folder import RunFolder
    from fedsplit.serving import ADDRESS, reach

    finished = RunFolder.finished(arguments.run) if arguments.run else None
    if finished and arguments.dtype:
        raise ConfigError(f"--dtype: {arguments.run} says itself what it computes in; leave it out")
    model = str(finished.model) if finished else arguments.model
    model_spec = ModelSpec(dtype=arguments.dtype or ModelSpec().dtype)
    tokenizer = load_tokenizer(model, arguments.revision)
    options = _decoding(arguments)
    torch.manual_seed(arguments.seed)
    given = ("served", "adapter", "tls_ca", "kv", "revision", "device")
    with reach(
        model,
        arguments.trunk or (finished.address if finished else ADDRESS),
        run=finished.run if finished else RunSpec(model=model_spec),
        token=_token(arguments),
        **{name: getattr(arguments, name) for name in given},
    ) as reached:
        writer = Writer(reached=reached, tokenizer=tokenizer, options=options, out=sys.stdout)
        yield writer
        print(writer.summary, file=sys.stderr)


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """How tokens are chosen, as `generate` of transformers takes it."""
    from fedsplit.prompting import draft_options

    if arguments.beams > 1 and arguments.draft:
        raise ConfigError("--beams and --draft do not go together; leave one of them out")
    numbers = {name: getattr(arguments, name) for name in _CHOOSING}
    chosen = {name: value for name, value in numbers.items() if value is not None}
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.sample or bool(chosen),
        "num_beams": arguments.beams,
        **chosen,
        **draft_options(arguments.draft),
    }


# --- what they share --------------------------------------------------------------------------


def _quiet() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our lines
    from fedsplit.console import quiet_libraries

    quiet_libraries()


def _token(arguments: argparse.Namespace) -> str:
    if not arguments.token_file:
        return os.environ.get(_TOKEN, "")
    token = Path(arguments.token_file).read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"--token-file {arguments.token_file} is empty; put the token there")
    return token
