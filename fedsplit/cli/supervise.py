"""The command `supervise`, which carries out a run on a SuperLink."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import Command
from fedsplit.errors import ConfigError

AppDir = Annotated[str, typer.Argument(metavar="APP", help="the folder of the Flower app")]
Name = Annotated[
    str, typer.Argument(metavar="[SUPERLINK]", help="its name in Flower's config.toml")
]
Config = Annotated[
    list[str],
    typer.Option(
        default_factory=list,
        show_default=False,
        metavar="FILE|KEY=VALUE",
        help="as of flwr run: a TOML file, or values of the run config",
    ),
]
State = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="names the run, and is made if it is missing; the same FILE continues the same run",
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        metavar="N", help="times that the run is submitted again without finishing a round"
    ),
]
Patience = Annotated[
    float, typer.Option(metavar="SECONDS", help="the longest time without an answer")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervise(Command):
    """Carry out a run on a SuperLink, and submit it again when it is gone."""

    example: ClassVar[str] = ". federation --run-config run.toml --state run.state"

    app: AppDir
    run_config: Config
    superlink: Name = ""
    state: State
    restarts: Restarts = 5
    patience: Patience = 600.0

    def run(self) -> None:
        """Follow the run until it is completed.

        Raises:
            FedsplitError: It failed, and would fail again; or there are no restarts left.
        """
        if self.restarts < 0 or self.patience <= 0:
            raise ConfigError(
                f"--restarts={self.restarts} must be at least 0, and --patience={self.patience:g} "
                "above 0"
            )
        from fedsplit.flower.control import SuperLink, read_config
        from fedsplit.flower.remote_run import RemoteRun
        from fedsplit.flower.supervision import supervise

        def say(line: str) -> None:
            print(line, flush=True)

        with closing(SuperLink.named(self.superlink)) as link:
            run = RemoteRun(
                link,
                Path(self.app),
                read_config("--run-config", self.run_config),
                Path(self.state),
                patience_s=self.patience,
                on_line=say,
            )
            supervise(run, restarts=self.restarts, say=say)
