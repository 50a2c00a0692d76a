"""The trunk server without Flower: serves models and adapters by name."""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedsplit.errors import ConfigError
from fedsplit.model import TrunkPart
from fedsplit.model.describe import trunk_of
from fedsplit.model.lora import load_adapter, share_frozen
from fedsplit.model.placement import devices_of, placed
from fedsplit.model.single_row import with_single_rows
from fedsplit.model.source import Source
from fedsplit.ranks.group import Ranks
from fedsplit.serve.peers import ALONE, Peers
from fedsplit.serve.shared import pretrained_run
from fedsplit.serve.trunk_states import TrunkStates
from fedsplit.spec import RunSpec, WireSpec
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.router import TrunkRouter
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.state import state_of
from fedsplit.trunk.update import TrunkUpdate

_MAX_CLIENTS = 64
"""The least limit on streams at a time; a run with many clients raises it."""

_DRAIN_S = 10.0
"""The longest wait for the other clients of a step that has begun when the server stops."""

_NAME_AND_VALUE = re.compile(r"([A-Za-z0-9_-]{1,64})=(.+)")


# --- what is served ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A trunk to serve: its name, and the directories or hub ids of its model and adapter."""

    name: str
    model: str
    adapter: str = ""
    revision: str = "main"


def plan(models: Sequence[str], adapters: Sequence[str], revision: str = "main") -> list[Served]:
    """The trunks to serve for arguments `[NAME=]MODEL` and `[NAME=]ADAPTER`.

    A model without a name gets the name of its directory. A named adapter adds a trunk: that of the
    first model with this adapter. An adapter without a name is added to the first model itself.

    >>> [each.name for each in plan(["base=gpt2"], ["medical=lora/medical"])]
    ['base', 'medical']
    >>> plan(["gpt2"], ["lora/medical"])
    [Served(name='gpt2', model='gpt2', adapter='lora/medical', revision='main')]

    Raises:
        ConfigError: There is no model, or two trunks would have one name.
    """
    if not models:
        raise ConfigError("nothing to serve; give --model DIR, or the folder of a finished run")
    served = [_served(text, revision) for text in models]
    for text in adapters:
        if match := _NAME_AND_VALUE.fullmatch(text):
            served.append(replace(served[0], name=match[1], adapter=match[2]))
        elif served[0].adapter:
            raise ConfigError(
                f"--adapter {text} would be the second on {served[0].name}; name it, NAME={text}, "
                "to serve it beside the other"
            )
        else:
            served[0] = replace(served[0], adapter=text)
    names = [each.name for each in served]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two trunks would be served as {duplicates[0]}; name them, NAME=DIR")
    return served


def _served(text: str, revision: str) -> Served:
    match = _NAME_AND_VALUE.fullmatch(text)
    name, model = match.groups() if match else (plain_name(text), text)
    return Served(name=name, model=model, revision=revision)


def plain_name(model: str) -> str:
    """The name of a model's directory, with all characters replaced that names cannot have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", Path(model).resolve().name)[:64] or "model"


# --- the server -------------------------------------------------------------------------------


@contextmanager
def hosted(
    served: Sequence[Served],
    run: RunSpec,
    wire: WireSpec,
    *,
    token: str = "",
    peers: Peers = ALONE,
    device: str = "cpu",
    update: type[TrunkUpdate] = TrunkUpdate,
    states: TrunkStates | None = None,
    on_failure: Callable[[], None] = lambda: None,
    telemetry: Telemetry = SILENT,
    ranks: Ranks | None = None,
) -> Iterator[str]:
    """A context that serves trunks for generation and training; gives the server's address.

    At its end the server refuses new calls, finishes calls in progress, and disconnects. With
    `states`, it first finishes the steps that have contributions, and saves the trunks after that.

    Args:
        served: The trunks; only the trunk's tensors of each model are read.
        run: The split, the budgets and the training options; each trunk trains separately. Clients
            that train must be configured with an equal run.
        wire: The address to listen on, and TLS.
        token: The token that clients must send; may be empty if only this machine can connect.
        peers: The other servers of these trunks.
        device: The torch device of the trunks; several as `cuda:0,cuda:1`, or `auto` for all GPUs.
        update: Makes a step of a trunk from the clients' gradients; that of the run's method.
        states: Where the trunks are saved, and restored from; by default they are not saved.
        on_failure: Called once all trunks have failed.
        telemetry: Receives the events of the trunks and of their server.
        ranks: Those that the one trunk is cut over, of which this is the first.

    Raises:
        ConfigError: Other machines could connect without a token, or the address is taken.
        FedsplitError: A model or an adapter cannot be read, or cannot be cut.
    """
    _require_token(wire, token)
    peers.check(run, update, is_saved=states is not None, clients_token=token)
    services = {
        each.name: _service(each.name, trunk, run, update, peers, telemetry, ranks)
        for each, trunk in trunks_of(served, run, device, ranks.size if ranks else 1)
    }
    if states:
        states.restore(services, run)
    router = TrunkRouter(services, token=token, max_clients=run.limits.clients)
    server = GrpcServer(
        router,
        wire=wire,
        limits=router.limits,
        max_clients=max(_MAX_CLIENTS, 2 * run.clients),
        budgets=run.limits,
        payload_of=router.payload_of,
        telemetry=telemetry,
    )
    _call_at_failure(router, on_failure)
    with _running(router, server, states) as bound:
        yield wire.advertise or bound


def _call_at_failure(router: TrunkRouter, on_failure: Callable[[], None]) -> None:
    def check_failed(_: "Future[None]") -> None:
        if all(ended.done() and ended.exception() for ended in router.trunks.values()):
            on_failure()

    for ended in router.trunks.values():
        ended.add_done_callback(check_failed)


def _require_token(wire: WireSpec, token: str) -> None:
    if not (wire.is_local or token):
        raise ConfigError(
            f"wire.bind={wire.bind} can be reached from other machines, and everybody there could "
            "use this trunk; give a token (--token-file, or FEDSPLIT_TOKEN)"
        )


def _service(
    name: str,
    trunk: TrunkPart,
    run: RunSpec,
    update: type[TrunkUpdate],
    peers: Peers,
    telemetry: Telemetry,
    ranks: Ranks | None,
) -> TrunkService:
    service: TrunkService
    if peers.leader:
        service = peers.follower(name, trunk, run, ranks)
    else:
        service = TrunkService(trunk, run, update=update, servers_token=peers.token, channel=ranks)
        if ranks:
            ranks.lead(trunk, service.engine.lose)
    service.engine.meter.telemetry = telemetry
    telemetry.watch(name, partial(state_of, service))
    return service


@contextmanager
def _running(router: TrunkRouter, server: GrpcServer, states: TrunkStates | None) -> Iterator[str]:
    """A context in which the trunks and the server run; gives the address that it listens on."""
    with ExitStack() as opened:
        if states:
            for name, steps in states.last_steps.items():
                router.resume(name, steps)
            opened.callback(states.finish)
        opened.enter_context(router)
        opened.callback(server.stop)
        opened.callback(router.close_followers)
        if states:
            opened.callback(router.drain, _DRAIN_S)
        yield server.start()


def trunks_of(
    served: Sequence[Served], run: RunSpec, device: str = "cpu", ranks: int = 1
) -> Iterator[tuple[Served, TrunkPart]]:
    """Each entry of `served` with its trunk; all adapters of a model share its weights.

    Args:
        served: The models and adapters.
        run: The run, of which the split is used.
        device: The torch device of the trunks.
        ranks: The number of ranks that the one trunk is cut over; all of them call this.

    Raises:
        ConfigError: Several trunks would be cut over ranks.
        FedsplitError: A model or an adapter cannot be read, or cannot be cut.
    """
    if ranks > 1 and len(served) > 1:
        raise ConfigError(
            f"{len(served)} trunks were asked for, but ranks compute one together; serve one "
            "with launch.trunk_tp, or each at a server of its own"
        )
    adapted: dict[tuple[str, str], TrunkPart] = {}
    for each in served:
        trunk = _trunk(each, run, device, ranks)
        # Each rank has its own device, where its shard was loaded.
        if ranks == 1:
            trunk = with_single_rows(placed(trunk, device))
        # A model without an adapter trains its own weights, so it cannot share them.
        if each.adapter:
            share_frozen(trunk, adapted.setdefault((each.model, each.revision), trunk))
        yield each, trunk


def _trunk(served: Served, run: RunSpec, device: str, ranks: int) -> TrunkPart:
    run = pretrained_run(run, served.model, served.revision, served.adapter)
    config = Source(name=served.model, revision=served.revision).config()
    trunk = trunk_of(run, config, devices_of(device)[0], ranks=ranks)
    if served.adapter:
        load_adapter(trunk, served.adapter)
    return trunk
