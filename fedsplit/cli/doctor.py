"""The command `doctor`: checks of a machine before it takes part in a deployment."""

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fedsplit.cli.command import (
    CLIENT_OPTIONS,
    Command,
    Revision,
    TlsCa,
    TokenFile,
    quiet,
    read_token,
)
from fedsplit.cli.serve import SERVER_OPTIONS, TlsCert, TlsKey
from fedsplit.errors import ConfigError

if TYPE_CHECKING:
    from fedsplit.doctor.result import Result
    from fedsplit.doctor.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor(Command):
    """Check this machine, its files and its servers; each check says what to do."""

    example: ClassVar[str] = "--trunk 127.0.0.1:9500 --model gpt2 --split 1/10/1"

    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="of the SuperLink, as of flower-supernode")
    ] = ""
    trunk: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="of the trunk server; default trunk-address of --node-config"
        ),
    ] = ""
    tls_ca: TlsCa = ""
    token_file: TokenFile = ""
    node_config: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="as of flower-supernode; its device, tls-ca and state-dir need no option here",
        ),
    ] = ""
    model: Annotated[str, typer.Option(metavar="DIR", help="the whole model, or its hub id")] = ""
    revision: Revision = "main"
    split: Annotated[str, typer.Option(metavar="1/2/1", help="blocks of bottom/trunk/top")] = ""
    device: Annotated[str, typer.Option(metavar="NAME", help="torch device; default cpu")] = ""
    state_dir: Annotated[str, typer.Option(metavar="DIR", help="folder of the state")] = ""
    bind: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="where this machine serves, or will serve, a trunk"),
    ] = ""
    tls_cert: TlsCert = ""
    tls_key: TlsKey = ""
    app: Annotated[
        str, typer.Option(metavar="DIR", help="the folder of the Flower app, before a run")
    ] = ""
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of all checks")] = False

    def run(self) -> None:
        """Print the result of each check.

        Raises:
            ConfigError: A check failed.
        """
        quiet()
        from fedsplit.doctor.examination import examine
        from fedsplit.doctor.result import State
        from fedsplit.doctor.subject import Machine

        results = [_named(each) for each in examine(self._subject(), Machine.here())]
        if self.as_json:
            print(json.dumps([dataclasses.asdict(each) for each in results], indent=1))
        else:
            print(_table(results))
        failed = [each.name for each in results if each.state is State.FAIL]
        if failed:
            raise ConfigError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")

    def _subject(self) -> "Subject":
        from fedsplit.doctor.subject import Subject
        from fedsplit.flower.control import read_config

        config = read_config("--node-config", [self.node_config]) if self.node_config else {}
        if self.node_config and not config:
            raise ConfigError(
                f"--node-config {self.node_config} sets nothing; give words of the form key=value"
            )
        token, token_error = "", ""
        try:
            token = read_token(self.token_file)
        except ConfigError as exc:
            token_error = str(exc)
        return Subject(
            superlink=self.superlink,
            trunk=self.trunk or str(config.get("trunk-address", "")),
            tls_ca=self.tls_ca or str(config.get("tls-ca", "")),
            token=token,
            token_file=self.token_file,
            token_error=token_error,
            node_config=config,
            model=self.model,
            revision=self.revision,
            split=self.split,
            device=self.device or str(config.get("device", "cpu")),
            state_dir=self.state_dir or str(config.get("state-dir", "")),
            bind=self.bind,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            app=self.app,
        )


def _named(result: "Result") -> "Result":
    """Return a result that names options in place of the fields of a run."""
    what, do = result.what, result.do
    for setting, option in {**CLIENT_OPTIONS, **SERVER_OPTIONS}.items():
        what, do = what.replace(setting, option), do.replace(setting, option)
    return dataclasses.replace(result, what=what, do=do)


def _table(results: "list[Result]") -> str:
    from fedsplit.console import table_text
    from fedsplit.doctor.result import State

    rows = []
    for each in results:
        state = str(each.state)
        rows.append((state.upper() if each.state is State.FAIL else state, each.name, each.what))
        if each.do:
            rows.append(("", "", f"-> {each.do}"))
    return table_text(rows)
