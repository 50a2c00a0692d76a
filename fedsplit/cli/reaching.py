"""The base class of commands that use a model with its trunk elsewhere, and their options."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from click import UsageError

from fedsplit.cli.command import Command, Revision, TlsCa, TokenFile, Traces, quiet, read_token
from fedsplit.errors import ConfigError
from fedsplit.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fedsplit.serve.client import Reached
    from fedsplit.telemetry.sinks import Sink, Telemetry

Model = Annotated[str, typer.Option(metavar="DIR", help="the whole model, or its hub id")]
Run = Annotated[str, typer.Option("--run", metavar="RUN_DIR", help="the folder of a finished run")]
Trunk = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="of the trunk server; default 127.0.0.1:9500, or the address of the run",
    ),
]
ServedName = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="name of the trunk at a server with several trunks; default its first"
    ),
]
Adapter = Annotated[
    str, typer.Option(metavar="DIR", help="the peft adapter that this trunk is served with")
]
Caches = Annotated[
    Literal["server", "client"], typer.Option(help="the side that stores the trunk's KV cache")
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="dtype of --model, as at the server; default float32"),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="torch device")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaching(Command):
    """A command that uses a model with its trunk elsewhere."""

    model: Model = ""
    run_dir: Run = ""
    trunk: Trunk = ""
    served_model_name: ServedName = ""
    adapter: Adapter = ""
    tls_ca: TlsCa = ""
    kv: Caches = "server"
    dtype: Dtype = None
    token_file: TokenFile = ""
    revision: Revision = "main"
    device: Device = "cpu"
    traces: Traces = ""

    def __post_init__(self) -> None:
        if not self.model and not self.run_dir:
            raise UsageError("one of the arguments --model --run is required")
        if self.model and self.run_dir:
            raise UsageError("argument --run: not allowed with argument --model")

    @contextmanager
    def reached(
        self, *sinks: "Sink"
    ) -> "Iterator[tuple[Reached, PreTrainedTokenizerFast, Telemetry]]":
        """Connect the model to its trunk; yield it with its tokenizer, and what takes its events.

        Args:
            sinks: Receive the events, beside the traces that were asked for.
        """
        quiet()
        from fedsplit.data import load_tokenizer
        from fedsplit.runs.folder import RunFolder
        from fedsplit.serve import ADDRESS, reach
        from fedsplit.telemetry.outlets import Outlets

        finished = RunFolder.finished(self.run_dir) if self.run_dir else None
        if finished and self.dtype:
            raise ConfigError(
                f"--dtype: {self.run_dir} says itself what it computes in; leave it out"
            )
        model = str(finished.model) if finished else self.model
        model_spec = ModelSpec(dtype=self.dtype or ModelSpec().dtype)
        tokenizer = load_tokenizer(model, self.revision)
        outlets = Outlets(traces=self.traces, asked_by=("", "--traces "))
        with ExitStack() as stack:
            telemetry = stack.enter_context(outlets.opened("client"))
            for sink in sinks:
                telemetry.add(sink)
            reached = reach(
                model,
                self.trunk or (finished.address if finished else ADDRESS),
                run=finished.run if finished else RunSpec(model=model_spec),
                token=read_token(self.token_file),
                served_model_name=self.served_model_name,
                adapter=self.adapter,
                tls_ca=self.tls_ca,
                kv=self.kv,
                revision=self.revision,
                device=self.device,
                telemetry=telemetry,
            )
            yield stack.enter_context(reached), tokenizer, telemetry
