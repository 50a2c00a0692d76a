"""The command `openai`: an OpenAI-compatible server on the client side."""

import shlex
import threading
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import CLIENT_OPTIONS, naming, quiet, read_secret
from fedsplit.cli.reaching import Reaching
from fedsplit.cli.waiting import set_on_signals, wait_for
from fedsplit.errors import ConfigError

Bind = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="where the server listens; port 0 is a free port")
]
ApiKeyFile = Annotated[
    str,
    typer.Option(metavar="FILE", help="file with the key that callers must present; default none"),
]
MaxRequests = Annotated[
    int, typer.Option(metavar="N", help="requests at a time; others are told to wait", min=1)
]
CacheBytes = Annotated[
    int,
    typer.Option(
        metavar="BYTES", help="memory for the caches of answered requests; 0 keeps none", min=0
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Openai(Reaching):
    """Serve a model to programs that speak OpenAI's API; its trunk stays elsewhere."""

    example: ClassVar[str] = "--trunk 127.0.0.1:9500 --model gpt2 --bind 127.0.0.1:8000"

    bind: Bind = "127.0.0.1:8000"
    api_key_file: ApiKeyFile = ""
    max_requests: MaxRequests = 8
    cache_bytes: CacheBytes = 256 << 20

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        with naming(CLIENT_OPTIONS):
            self._serve()

    def _serve(self) -> None:
        quiet()
        from fedsplit.openai.server import Binding, serving
        from fedsplit.serve import plain_name
        from fedsplit.telemetry.prometheus import Prometheus

        key = read_secret("--api-key-file", self.api_key_file) if self.api_key_file else ""
        binding = Binding(address=self.bind, api_key=key)
        name = self.served_model_name or plain_name(self.run_dir or self.model)
        try:
            metrics = [Prometheus("/metrics ")]
        except ConfigError:  # the extra is not installed, as /metrics then says
            metrics = []
        stopped = threading.Event()
        with (
            self.reached(*metrics) as (reached, tokenizer, telemetry),
            serving(
                reached,
                tokenizer,
                binding,
                model=name,
                max_requests=self.max_requests,
                cache_bytes=self.cache_bytes,
                telemetry=telemetry,
                metrics=metrics[0] if metrics else None,
            ) as address,
        ):
            set_on_signals(stopped)
            # Flushed, since other programs wait for this line.
            print(self._ready_line(name, address), flush=True)
            wait_for(stopped)

    def _ready_line(self, name: str, address: str) -> str:
        key = f' -H "Authorization: Bearer $(cat {shlex.quote(self.api_key_file)})"'
        return (
            f"serving {name} at http://{address}/v1; try: curl http://{address}/v1/models"
            f"{key if self.api_key_file else ''}"
        )
