"""The `fedsplit` command: typer parses the command line into the object of a command."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from click import ClickException

from fedsplit.cli.audit import Audit
from fedsplit.cli.certs import Init, Request, Show, Sign
from fedsplit.cli.command import Command, share_cores
from fedsplit.cli.doctor import Doctor
from fedsplit.cli.fields import served_fields
from fedsplit.cli.generate import Chat, Generate
from fedsplit.cli.info import Info
from fedsplit.cli.models import Join, Split
from fedsplit.cli.openai import Openai
from fedsplit.cli.results import Compare, Plot, Report, Shards, Timeline, Watch
from fedsplit.cli.serve import Serve
from fedsplit.cli.supervise import Supervise
from fedsplit.console import begin_log, ending_with_its_reader, print_error

_CERTS = (Init, Request, Sign, Show)
_COMMANDS = (
    Split,
    Join,
    Info,
    Plot,
    Report,
    Watch,
    Timeline,
    Compare,
    Shards,
    Audit,
    Serve,
    Generate,
    Chat,
    Openai,
    Supervise,
    Doctor,
)
_EXAMPLES = (
    "examples:",
    "fedsplit split gpt2 --split 1/10/1 --out parts",
    "fedsplit join parts/bottom-top parts/trunk --out whole",
    "fedsplit serve --model gpt2 --split 1/10/1",
    'fedsplit generate --model gpt2 "Once upon a time"',
    "fedsplit openai --model gpt2",
    "fedsplit info 127.0.0.1:9500",
    "fedsplit doctor --trunk 127.0.0.1:9500 --model gpt2 --split 1/10/1",
    "fedsplit certs init --out authority",
    "fedsplit plot runs/default",
    "fedsplit report runs/default",
    "fedsplit watch runs/default",
    "fedsplit timeline traces",
    "fedsplit compare runs/default runs/default-2 --out compared",
    "fedsplit audit runs/default --quick",
    "fedsplit shards sharding=dirichlet sharding.alpha=0.1 clients=8 --out shards",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of a command line.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit status: 0; 1 after an error, which is one line on stderr, after its traceback with
        --debug; 2 for a command line that cannot be parsed; 130 after Ctrl-C.

    Raises:
        SystemExit: The reader of the output has closed it, or a shell asked for completions.
    """
    debug = False
    share_cores()
    try:
        with ending_with_its_reader():
            if command := _parsed(argv):
                debug = command.debug
                begin_log("warning", form=command.log_format, level=command.log_level)
                command.run()
            return 0
    except ClickException as exc:
        exc.show()
        return exc.exit_code
    except KeyboardInterrupt:
        # 128 + SIGINT, as shells report it.
        return 130
    except Exception as exc:
        print_error(exc, debug=debug)
        return 1


def _parsed(argv: Sequence[str] | None) -> Command | None:
    """Return the command; None with --help and --version, after typer has printed them."""
    parser = typer.main.get_command(typer_app())
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = parser.main(arguments or ["--help"], prog_name="fedsplit", standalone_mode=False)
    return parsed if isinstance(parsed, Command) else None


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedsplit {version('fedsplit')}")
        raise typer.Exit


_Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
]


def _options(version: _Version = False) -> None:
    """Take the options before a command; the callback of each one does its work."""


def typer_app() -> typer.Typer:
    """Return the app of all commands, from which typer makes the parser and the help."""
    app = typer.Typer(
        help="Federated split learning of Hugging Face language models.",
        # typer joins the lines of a paragraph.
        epilog="\n\n".join(_EXAMPLES),
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=_options,
    )
    _add(app, "", _COMMANDS)
    certs = typer.Typer(help="Make certificates of servers with an authority of your own.")
    _add(certs, "certs ", _CERTS)
    app.add_typer(certs, name="certs")
    return app


def _add(app: typer.Typer, group: str, commands: Sequence[type[Command]]) -> None:
    for command in commands:
        name = command.__name__.lower()
        lines = [f"example: fedsplit {group}{name} {command.example}"]
        if command is Serve:
            lines += served_fields()
        app.command(name, epilog="\n\n".join(lines))(command)
