"""The base class of commands, and options and functions that several commands share.

The fields of a command are its arguments and options, and `Annotated` has their help. typer reads
the fields, parses the command line and makes the object; `main` then calls `run`. Methods import
the libraries that they need, so that `fedsplit --help` is fast.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.console import FORMAT_VARIABLE, LEVEL_VARIABLE
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.telemetry.logs import FORMATS, LEVELS

TOKEN_VARIABLE = "FEDSPLIT_TOKEN"

TokenFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help=f"file with the server's token; without it, {TOKEN_VARIABLE} of the environment",
    ),
]
Revision = Annotated[str, typer.Option(metavar="R", help="of hub ids")]
TlsCa = Annotated[
    str, typer.Option(metavar="FILE", help="PEM of the authority to trust, if the server has TLS")
]

Traces = Annotated[
    str,
    typer.Option(metavar="DIR", help="where the times of traced requests go; by default nowhere"),
]
Debug = Annotated[bool, typer.Option("--debug", help="print the traceback of an error")]
LogFormat = Annotated[
    str,
    typer.Option(
        metavar="|".join(FORMATS), envvar=FORMAT_VARIABLE, help="format of the log on stderr"
    ),
]
LogLevel = Annotated[
    str,
    typer.Option(
        metavar="|".join(LEVELS), envvar=LEVEL_VARIABLE, help="level of the log; default warning"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(ABC):
    """A command; a subclass is a frozen dataclass, and its docstring is the help.

    Attributes:
        example: Arguments of the example in the help.
        debug: Whether the traceback of an error is printed.
        log_format, log_level: Those of the log, also in processes that the command starts.
    """

    example: ClassVar[str]

    debug: Debug = False
    log_format: LogFormat = ""
    log_level: LogLevel = ""

    @abstractmethod
    def run(self) -> None:
        """Run the command.

        Raises:
            FedsplitError: The command failed.
            OSError: A file cannot be read or written.
        """


def quiet() -> None:
    """Turn off the output of gRPC and transformers, which would mix with that of the command."""
    # gRPC reads the variable when it starts.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from fedsplit.console import quiet_libraries

    quiet_libraries()


def share_cores() -> None:
    """Have torch's idle threads sleep soon, so that other processes get their cores.

    A client and its trunk on one machine compute in turns. GNU OpenMP's threads otherwise spin for
    milliseconds after each computation, in which the other side computes. It reads the variables
    when torch is imported, so call this before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # About a tenth of a millisecond: longer than the pauses within a pass.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


CLIENT_OPTIONS = {"wire.tls_ca": "--tls-ca"}
"""The options of commands that call a trunk server, by the field of a run that each one sets."""


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """A context whose errors name a command's options in place of the fields of a run."""
    try:
        yield
    except FedsplitError as exc:
        text = str(exc)
        for field, option in options.items():
            text = text.replace(field, option)
        raise type(exc)(text) from exc


def read_token(file: str) -> str:
    """Return the token of a file, or of the environment if `file` is ""; "" without a token.

    Raises:
        ConfigError: The file cannot be read, is empty, or is not in ASCII.
    """
    return read_secret("--token-file", file) if file else os.environ.get(TOKEN_VARIABLE, "")


def read_secret(option: str, file: str) -> str:
    """Return the token or key in a file that an option names.

    Raises:
        ConfigError: The file cannot be read, is empty, or is not in ASCII.
    """
    try:
        secret = Path(file).read_text(encoding="ascii").strip()
    except OSError as exc:
        raise ConfigError(f"{option} {file} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        # The metadata of gRPC and the headers of HTTP, which carry it, are ASCII.
        raise ConfigError(
            f"{option} {file} has characters outside ASCII; make a token with openssl rand -hex 32"
        ) from exc
    if not secret:
        raise ConfigError(f"{option} {file} is empty; put the token or key there")
    return secret
