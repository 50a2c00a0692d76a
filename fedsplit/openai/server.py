"""The server's process: the model's application on a socket, in a thread of its own."""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from fedsplit.errors import ConfigError
from fedsplit.openai.app import Api
from fedsplit.openai.generation import Writer
from fedsplit.openai.jobs import Jobs
from fedsplit.openai.lanes import Lanes
from fedsplit.openai.refusals import Refusal
from fedsplit.openai.shared_head import shared_head
from fedsplit.serve.chat import require_language_head
from fedsplit.serve.client import Reached
from fedsplit.telemetry.prometheus import Prometheus
from fedsplit.telemetry.sinks import Telemetry
from fedsplit.wire.messages import ServiceInfoRequest

_HEALTH_DEADLINE_S = 5.0
_GRACE_S = 5
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The address to listen on, and the key that callers must present; empty for none.

    Raises:
        ConfigError: The address is not host:port, or other machines reach it and there is no key.
    """

    address: str = "127.0.0.1:8000"
    api_key: str = ""

    def __post_init__(self) -> None:
        host, _ = self.host_and_port
        if not self.api_key and not _is_loopback(host):
            raise ConfigError(
                f"--bind {self.address} is reached from other machines, which could use the model; "
                "add --api-key-file, or bind to 127.0.0.1"
            )

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The two parts of the address."""
        try:
            parts = urlsplit(f"//{self.address}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port is None:
            raise ConfigError(
                f"--bind {self.address} is not host:port; give such as 127.0.0.1:8000"
            )
        return host, port


@contextmanager
def serving(
    reached: Reached,
    tokenizer: PreTrainedTokenizerFast,
    binding: Binding,
    *,
    model: str,
    max_requests: int,
    cache_bytes: int,
    telemetry: Telemetry,
    metrics: Prometheus | None,
) -> Iterator[str]:
    """A context in which a model is served; yields the address, host:port.

    Args:
        reached: The model, connected to its trunk.
        tokenizer: The model's tokenizer.
        binding: The address to listen on, and the key.
        model: The id of the model.
        max_requests: The most requests at a time.
        cache_bytes: The most bytes of the caches of requests that were answered.
        telemetry: Receives the events of requests.
        metrics: The sink that `/metrics` shows; None if its library is not installed.

    Raises:
        ConfigError: The model writes no text, or the address cannot be listened on.
    """
    require_language_head(reached.model)
    with (
        shared_head(reached.model),
        closing(_listening(binding)) as listener,
        closing(reached.route.link(_HEALTH_DEADLINE_S)) as link,
        closing(
            Jobs(
                Writer(reached.model, tokenizer, reached.drafts(), cache_bytes),
                Lanes(reached, max_requests),
                telemetry,
            )
        ) as jobs,
    ):
        asked = ServiceInfoRequest(served_model_name=reached.route.served_model_name)
        api = Api(
            jobs,
            model=model,
            api_key=binding.api_key,
            trunk_info=lambda: link.exchange(asked),
            metrics=_exposition(metrics),
        )
        with _running(api.app(), listener, jobs):
            host, port = listener.getsockname()[:2]
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _running(app: FastAPI, listener: socket.socket, jobs: Jobs) -> Iterator[None]:
    """A context in which a thread runs the application's event loop."""
    config = uvicorn.Config(
        app,
        access_log=False,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=_GRACE_S,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="fedsplit-openai")
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        server.should_exit = True
        # Answers that are being written end, so that the server's thread does.
        jobs.cancel()
        thread.join()


def _listening(binding: Binding) -> socket.socket:
    host, port = binding.host_and_port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        raise ConfigError(
            f"--bind {binding.address} cannot be listened on: {exc.strerror or exc}; choose "
            "another address, or port 0 for a free port"
        ) from exc


def _exposition(metrics: Prometheus | None) -> Callable[[], tuple[bytes, str]]:
    if metrics:
        return metrics.exposition

    def missing() -> tuple[bytes, str]:
        raise Refusal(
            404,
            "metrics need prometheus-client, which is not installed here: pip install "
            "'fedsplit[metrics]', and start the server again",
            code="not_found",
        )

    return missing


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be any machine's
        return False
