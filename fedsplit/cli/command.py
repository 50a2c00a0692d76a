"""A command: a class whose fields are its arguments and options, and helpers of several commands.

typer reads the fields (`Annotated` gives the help text), parses the command line and makes the
object; `main` then calls `run`. Libraries are imported by the method that needs them, so that
`fedsplit --help` is quick.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.errors import ConfigError

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


class Command(ABC):
    """What a command line asks for; a subclass is a frozen dataclass, its docstring the help.

    Attributes:
        example: Arguments that the help shows.
    """

    __slots__ = ()
    example: ClassVar[str]

    @abstractmethod
    def run(self) -> None:
        """Carry it out.

        Raises:
            FedsplitError: It cannot be done.
            OSError: A file cannot be read or written.
        """


def quiet() -> None:
    """Turn off what gRPC and transformers print beside a command's own lines."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from fedsplit.console import quiet_libraries

    quiet_libraries()


def read_token(file: str) -> str:
    """The token in a file, or in the environment if no file is given; "" if there is none.

    Raises:
        ConfigError: The file is empty.
    """
    if not file:
        return os.environ.get(TOKEN_VARIABLE, "")
    token = Path(file).read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"--token-file {file} is empty; put the token there")
    return token


def one_line(text: str) -> str:
    """Text of a peer or a library, without line ends and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
