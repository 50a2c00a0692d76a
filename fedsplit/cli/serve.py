"""The command `serve`: a server of trunks."""

import logging
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from fedsplit.cli.command import (
    Command,
    Revision,
    TlsCa,
    TokenFile,
    Traces,
    naming,
    quiet,
    read_secret,
    read_token,
)
from fedsplit.cli.waiting import set_on_signals, wait_for
from fedsplit.errors import ConfigError, Internal
from fedsplit.spec import RunSpec, WireSpec

if TYPE_CHECKING:
    from fedsplit.ranks.group import Ranks
    from fedsplit.runs.folder import RunFolder
    from fedsplit.serve import Served
    from fedsplit.serve.peers import Peers
    from fedsplit.telemetry.outlets import Outlets
    from fedsplit.trunk.update import TrunkUpdate

log = logging.getLogger(__name__)

_TRY = '"Once upon a time"'

Words = Annotated[
    list[str],
    typer.Argument(
        default_factory=list,
        show_default=False,
        metavar="[RUN_DIR | OVERRIDE]...",
        help="the folder of a finished run, and field=value for budgets and training",
    ),
]
Models = Annotated[
    list[str],
    typer.Option(
        default_factory=list,
        show_default=False,
        metavar="[NAME=]DIR",
        help="directory or hub id of a whole model; several to serve several",
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        default_factory=list,
        show_default=False,
        metavar="[NAME=]DIR",
        help="peft adapter on the first model; with a name, served beside it",
    ),
]
BlocksOption = Annotated[
    str, typer.Option(metavar="1/2/1", help="blocks of bottom/trunk/top; default 1/*/1")
]
Bind = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="host:port or unix:path; default 127.0.0.1:9500, or a free port for a run",
    ),
]
Advertise = Annotated[
    str,
    typer.Option(metavar="HOST:PORT", help="the address for clients, if it differs from --bind"),
]
TlsCert = Annotated[str, typer.Option(metavar="FILE", help="PEM of the server's certificate chain")]
TlsKey = Annotated[str, typer.Option(metavar="FILE", help="PEM of the server's key")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="allow other machines to connect without TLS")
]
Devices = Annotated[
    str,
    typer.Option(metavar="NAME", help="torch device; several, cuda:0,cuda:1, or auto for all GPUs"),
]
Quantize = Annotated[
    str,
    typer.Option(
        metavar="off|nf4|int8",
        help="bits of the trunks' linear layers: 4, 8, or those of the model; without "
        "lora.enabled=true the trunks are then frozen",
    ),
]
NumRanks = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="cut every matrix of the trunk over N processes, each with a CPU or GPU of its own",
    ),
]
StateDir = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="where trunks that train are saved, and read from at the next start; by default they "
        "are not saved",
    ),
]
SaveEvery = Annotated[
    int, typer.Option(metavar="STEPS", help="steps of a trunk between two of its saved states")
]
Leader = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="server that steps the same trunks; this one then serves a part of their clients",
    ),
]
PeersTokenFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="token that the servers of a trunk share, and no client has; for leader and followers",
    ),
]
Metrics = Annotated[
    str,
    typer.Option(metavar="HOST:PORT", help="where Prometheus reads metrics; by default nowhere"),
]
ClientLabels = Annotated[
    list[str],
    typer.Option(
        default_factory=list,
        show_default=False,
        metavar="CLIENT",
        help="client that metrics name; several to name several, by default none",
    ),
]

SERVER_OPTIONS = {
    "wire.bind": "--bind",
    "wire.advertise": "--advertise",
    "wire.tls_cert": "--tls-cert",
    "wire.tls_key": "--tls-key",
    "wire.tls_ca": "--tls-ca",
    "wire.insecure=true": "--insecure",
    "model.quantize": "--quantize",
    "launch.trunk_tp": "--tp",
    "launch.trunk_device": "--device",
}
"""The options of `serve` that set fields of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve(Command):
    """Serve the trunks of models, or the trunk of a finished run."""

    example: ClassVar[str] = "--model gpt2 --split 1/10/1 (or: fedsplit serve runs/default)"

    words: Words
    model: Models
    adapter: Adapters
    split: BlocksOption = ""
    bind: Bind = ""
    advertise: Advertise = ""
    tls_cert: TlsCert = ""
    tls_key: TlsKey = ""
    insecure: Insecure = False
    token_file: TokenFile = ""
    revision: Revision = "main"
    device: Devices = "cpu"
    quantize: Quantize = "off"
    state_dir: StateDir = ""
    save_every: SaveEvery = 50
    leader: Leader = ""
    peers_token_file: PeersTokenFile = ""
    tls_ca: TlsCa = ""
    tp: NumRanks = 1
    metrics: Metrics = ""
    traces: Traces = ""
    client_label: ClientLabels

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        for word in self.words:
            for setting, option in SERVER_OPTIONS.items():
                if word.partition("=")[0] == setting.partition("=")[0]:
                    raise ConfigError(f"{word!r} is not used by serve; set the option {option}")
        with naming(SERVER_OPTIONS):
            self._serve()

    def _serve(self) -> None:
        quiet()
        from fedsplit.ranks.group import ranks_of
        from fedsplit.ranks.replay import replay
        from fedsplit.runs.folder import RunFolder
        from fedsplit.serve import plain_name, plan, trunks_of
        from fedsplit.trunk.follower_training import FollowerTraining
        from fedsplit.trunk.training import Training

        folders = [word for word in self.words if "=" not in word]
        if len(folders) + bool(self.model) > 1:
            raise ConfigError(f"serve either {folders[0]} or something else; not both at once")
        finished = RunFolder.finished(folders[0]) if folders else None
        if finished:
            served = plan([f"{plain_name(folders[0])}={finished.model}"], self.adapter)
        else:
            served = plan(self.model, self.adapter, self.revision)
        run = self._run_spec(finished.run if finished else None)
        with ranks_of(self.tp, [sys.executable, "-m", "fedsplit", *sys.argv[1:]]) as ranks:
            if ranks and ranks.rank:
                ((_, trunk),) = trunks_of(served, run, ranks.device, ranks.size)
                training = FollowerTraining if self.leader else Training
                replay(ranks, trunk, run, update_of(run), training)
            else:
                self._serve_to_clients(served, run, finished, ranks)

    def _serve_to_clients(
        self,
        served: "Sequence[Served]",
        run: RunSpec,
        finished: "RunFolder | None",
        ranks: "Ranks | None",
    ) -> None:
        from fedsplit.serve import ADDRESS, TrunkStates, hosted

        wire = self._wire(run, "127.0.0.1:0" if finished else ADDRESS)
        stopped, failed = threading.Event(), threading.Event()

        def stop_after_failure() -> None:
            # In this order: the main thread reads `failed` after `stopped` is set.
            failed.set()
            stopped.set()

        with ExitStack() as opened:
            told: list[str] = []
            telemetry = opened.enter_context(self._outlets().opened("server", announce=told.append))
            states = None
            if self.state_dir:
                states = opened.enter_context(TrunkStates(Path(self.state_dir), self.save_every))
            hosting = hosted(
                served,
                run,
                wire,
                token=read_token(self.token_file),
                peers=self._peers(run),
                device=ranks.device if ranks else self.device,
                update=update_of(run),
                states=states,
                on_failure=stop_after_failure,
                telemetry=telemetry,
                ranks=ranks,
            )
            address = opened.enter_context(hosting)
            set_on_signals(stopped)
            if finished:
                opened.enter_context(finished.announced(address))
            source = ["--run", str(finished.path)] if finished else ["--trunk", address]
            # Flushed, since other programs wait for this line.
            versions = states.versions if states else {}
            print(self._ready_line(served, versions, run, address, source), flush=True)
            for line in told:
                print(line, flush=True)
            wait_for(stopped)
            if ranks:
                ranks.wait_if_lost()
        if failed.is_set():
            raise Internal(
                "all trunks of this server have failed; the tracebacks above have the reasons"
            )

    def _wire(self, run: RunSpec, bind: str) -> WireSpec:
        return replace(
            run.wire,
            bind=self.bind or bind,
            advertise=self.advertise,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            insecure=self.insecure,
        )

    def _peers(self, run: RunSpec) -> "Peers":
        from fedsplit.serve.peers import Peers

        file = self.peers_token_file
        # Without a file, the environment would give the clients' token.
        token = read_secret("--peers-token-file", file) if file else ""
        # A server with TLS takes its leader to have it as well.
        wire = replace(run.wire, tls_ca=self.tls_ca, tls_cert=self.tls_cert, tls_key=self.tls_key)
        return Peers(token=token, leader=self.leader, wire=wire)

    def _outlets(self) -> "Outlets":
        from fedsplit.telemetry.outlets import Outlets

        if self.client_label and not self.metrics:
            raise ConfigError(
                f"--client-label {self.client_label[0]} needs --metrics, which is missing; give "
                "both, or neither"
            )
        return Outlets(
            metrics=self.metrics,
            traces=self.traces,
            certificate=self.tls_cert,
            clients=tuple(self.client_label),
            asked_by=("--metrics ", "--traces "),
        )

    def _run_spec(self, finished: RunSpec | None) -> RunSpec:
        from fedsplit.config import changed, compose

        overrides = [word for word in self.words if "=" in word]
        # First, so that split.bottom=... among the words takes precedence.
        if self.split:
            overrides.insert(0, f"split={self.split}")
        return self._with_options(changed(finished, overrides) if finished else compose(overrides))

    def _with_options(self, run: RunSpec) -> RunSpec:
        # Other servers of this trunk are those of the options.
        launch = replace(run.launch, trunk_tp=self.tp, trunk_servers=1, trunk_device=self.device)
        model, train = replace(run.model, quantize=self.quantize), run.train
        if self.quantize != "off" and run.trains_trunk_in_full:
            train = replace(train, mode="frozen_trunk")
        return replace(run, launch=launch, model=model, train=train)

    def _ready_line(
        self,
        served: "Sequence[Served]",
        versions: Mapping[str, int],
        run: RunSpec,
        address: str,
        source: Sequence[str],
    ) -> str:
        names = ", ".join(
            f"{each.name} at version {versions[each.name]}"
            if versions.get(each.name)
            else each.name
            for each in served
        )
        options = [*source]
        if "--trunk" in source:
            options += ["--model", served[0].model]
            options += ["--adapter", served[0].adapter] if served[0].adapter else []
        options += ["--tls-ca", self.tls_cert] if self.tls_cert else []
        options += ["--token-file", self.token_file] if self.token_file else []
        return (
            f"serving {names} (cut {run.split}) at {address}; try: "
            f"fedsplit generate {shlex.join(options)} {_TRY}"
        )


def update_of(run: RunSpec) -> "type[TrunkUpdate]":
    """Return how the run's method makes a step of the trunk, as far as a server can without Flower.

    Raises:
        ConfigError: `strategy.target` cannot be imported, or is not a `SplitStrategy`.
    """
    from fedsplit.config import resolve
    from fedsplit.trunk.update import TrunkUpdate

    method, target = resolve(run.strategy.target), run.strategy.target
    update: type[TrunkUpdate] | None = getattr(method, "update", None)
    if not (isinstance(update, type) and issubclass(update, TrunkUpdate)):
        raise ConfigError(
            f"strategy.target={target} does not say how the trunk steps; name a subclass of "
            "fedsplit.flower.strategy.SplitStrategy"
        )
    if update.replicas:
        log.warning(
            "%s averages the clients' replicas of the trunk after a round, but this server has no "
            "rounds; clients that train here share one trunk",
            target,
        )
        return TrunkUpdate
    return update
