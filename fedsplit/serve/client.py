"""The client of `fedsplit serve`: builds the client's part and connects it to a trunk."""

import secrets
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, TokenizersBackend

from fedsplit.client.drafts import Drafts
from fedsplit.client.evaluation import EvaluationTrunk
from fedsplit.client.ledger import Ledger
from fedsplit.client.metered import MeteredLink
from fedsplit.client.privacy import NoiseKey, Shield
from fedsplit.client.public_text import public_ids, public_rows
from fedsplit.client.remote import RemoteTrunk
from fedsplit.errors import ConfigError, FedsplitError, ModelMismatch, peer_text
from fedsplit.link import Link
from fedsplit.model import ClientPart, connect
from fedsplit.model.describe import client_of
from fedsplit.model.identity import model_fingerprint, model_settings
from fedsplit.model.lora import load_adapter
from fedsplit.model.placement import on_device
from fedsplit.model.rope import by_length
from fedsplit.model.single_row import with_single_rows
from fedsplit.model.source import Source
from fedsplit.serve.shared import ADDRESS, pretrained_run
from fedsplit.spec import ModelSpec, RunSpec, SplitSpec, WireSpec
from fedsplit.telemetry.sinks import SILENT, Telemetry
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import (
    PROTOCOL,
    OpenRequest,
    ServiceInfoReply,
    ServiceInfoRequest,
)

_PUBLIC_TOKENS = 32
"""The length of the public sequences that give the statistics of a shield."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way to a served trunk: makes links to it, and a client's sessions over them.

    Attributes:
        address: The server's address.
        token: The server's token.
        run: The run, with the server's cut.
        wire: The deadlines of calls and the client's TLS settings.
        client: The client's name.
        served_model_name: The trunk's name at the server.
        kv: The side that keeps the trunk's keys and values.
        telemetry: Receives the events of the client.
    """

    address: str
    token: str
    run: RunSpec
    wire: WireSpec
    client: str
    served_model_name: str
    kv: str
    telemetry: Telemetry

    def link(self, deadline_s: float = 0.0) -> GrpcLink:
        """Return a link with a connection of its own; 0 is the run's deadline of a call."""
        wire = replace(self.wire, call_deadline_s=deadline_s) if deadline_s else self.wire
        return GrpcLink(self.address, token=self.token, wire=wire)

    def trunk(self, link: Link, model: ClientPart) -> RemoteTrunk:
        """Return a handle of the trunk for the sessions of a model over a link."""
        return RemoteTrunk(
            MeteredLink(link, self.telemetry) if self.telemetry else link,
            model,
            self.run,
            client=self.client,
            served_model_name=self.served_model_name,
            kv=self.kv,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reached:
    """A client's model, connected to a served trunk, to generate or to train.

    `trunk` is the argument of `ClientTrainer` beside the model, `link` counts bytes, and `route`
    makes further links. As a context manager it closes the link at the end.
    """

    model: ClientPart
    trunk: RemoteTrunk
    link: GrpcLink
    route: Route

    def drafts(self) -> Drafts | None:
        """Return a source of drafts for the texts of this client, from the measured round trip.

        It is the `assistant_model` of `generate`, for greedy decoding of one sequence. There is
        none for a model that cannot go back to an earlier token, or whose rotary tables depend on
        the tokens in a pass.

        Raises:
            FedsplitError: The trunk could not be reached.
        """
        config = self.model.config
        if self.model._is_stateful or by_length(config):
            return None
        request = ServiceInfoRequest(served_model_name=self.route.served_model_name)
        began = time.perf_counter()
        self.link.exchange(request)
        return Drafts(config, time.perf_counter() - began)

    def __enter__(self) -> "Reached":
        return self

    def __exit__(self, *_: object) -> None:
        self.trunk.disconnect()
        self.link.close()


def reach(
    source: str,
    trunk: str = ADDRESS,
    *,
    served_model_name: str = "",
    adapter: str = "",
    token: str = "",
    tls_ca: str = "",
    kv: str = "server",
    run: RunSpec | None = None,
    revision: str = "main",
    device: str = "cpu",
    client: str = "",
    telemetry: Telemetry = SILENT,
) -> Reached:
    """Build the client's part of a model, with the server's cut, and connect it to its trunk.

    Args:
        source: Directory or hub id of the whole model; only the client's tensors are read.
        trunk: The server's address.
        served_model_name: The trunk's name at the server; by default the first one.
        adapter: Directory or hub id of the peft adapter that this trunk is served with.
        token: The server's token, if it requires one.
        tls_ca: The PEM file of the authority to trust, if the server has TLS.
        kv: The side that keeps the trunk's keys and values: `server` or `client`.
        run: The run that the server was configured with, needed to train; the split is its own.
        revision: The revision of a hub id.
        device: The torch device of the client's part.
        client: The client's name, which decides its dropout; by default a random one.
        telemetry: Receives an event for each token that is generated and each attempt that fails.

    Raises:
        ModelMismatch: The server serves another model, or no trunk of this name.
        FedsplitError: The server cannot be reached, or the model cannot be read.
    """
    # Any attention that the family has: only clients that train must be configured as the server.
    run = run or RunSpec(model=ModelSpec(attention="auto"))
    wire = replace(run.wire, bind=WireSpec().bind, tls_cert="", tls_key="", tls_ca=tls_ca)
    route = Route(
        address=trunk,
        token=token,
        run=run,
        wire=wire,
        client=client or f"client-{secrets.token_hex(8)}",
        served_model_name=served_model_name,
        kv=kv,
        telemetry=telemetry,
    )
    link = route.link()
    with ExitStack() as on_failure:
        on_failure.callback(link.close)
        reached = _over(link, route, source, revision=revision, adapter=adapter, device=device)
        on_failure.pop_all()
    return reached


def _over(
    link: GrpcLink, route: Route, source: str, *, revision: str, adapter: str, device: str
) -> Reached:
    """The client's part with the cut of the server at the end of a link, connected to its trunk."""
    info = link.exchange(ServiceInfoRequest(served_model_name=route.served_model_name))
    route = replace(route, run=replace(route.run, split=SplitSpec.parse(info.blocks)))
    config = Source(name=source, revision=revision).config()
    if not _is_of(info.model, config, route.run.split):
        raise _mismatch(source, route.address, _difference(link, info, config, route), info)
    model = client_of(pretrained_run(route.run, source, revision, adapter), config, device)
    if adapter:
        load_adapter(model, adapter)
    with_single_rows(on_device(model, device)).eval()  # type: ignore[no-untyped-call]
    remote = route.trunk(link, model)
    connect(model, remote)
    return Reached(model=model, trunk=remote, link=link, route=route)


@contextmanager
def shielded(
    reached: Reached, z: float, state_dir: Path, public: str, tokenizer: TokenizersBackend
) -> Iterator[Ledger]:
    """A context in which the trunk gets noisy rows; yields the ledger of what they tell.

    Args:
        reached: The model, connected to its trunk.
        z: The size of the noise, in radii of public rows.
        state_dir: The folder of the noise key and the ledger.
        public: A file of public text; empty for random tokens.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: The public text cannot be used.
        StorageError: Key or ledger cannot be written.
    """
    model, trunk = reached.model, reached.trunk
    ids_BT = public_ids(public, _PUBLIC_TOKENS, tokenizer, model.config)
    with closing(Ledger(state_dir / "ledger.db")) as ledger:
        key = NoiseKey.kept(state_dir / "noise.key")
        shield = Shield(trunk, public_rows(model, ids_BT), key, z=z, ledger=ledger)
        connect(model, shield)
        yield ledger


def _mismatch(source: str, trunk: str, why: str, info: ServiceInfoReply) -> ModelMismatch:
    return ModelMismatch(
        f"{source} is not the model of which {trunk} serves the trunk ({why}); use the same model "
        "at both sides, or choose another trunk of the server: "
        f"{peer_text(', '.join(info.served_model_names))}"
    )


def _is_of(fingerprint: str, config: PretrainedConfig, split: SplitSpec) -> bool:
    try:
        return model_fingerprint(config, split) == fingerprint
    except ConfigError:  # the model has fewer blocks than the cut needs
        return False


def _difference(
    link: GrpcLink, info: ServiceInfoReply, config: PretrainedConfig, route: Route
) -> str:
    """The settings in which the client's model differs, as far as the server names them."""
    split = route.run.split
    try:
        model, settings = model_fingerprint(config, split), model_settings(config, split)
        # Only the trunk knows its settings; it names them as it refuses the session.
        link.exchange(
            OpenRequest(
                protocol=PROTOCOL,
                client=route.client,
                model=model,
                config="",
                hidden_size=info.limits.hidden_size,
                round=0,
                training=False,
                generating=True,
                served_model_name=route.served_model_name,
                model_settings=settings,
            )
        )
    except ModelMismatch as exc:
        return str(exc)
    except FedsplitError:  # no token, or too few blocks
        pass
    return f"a {info.family} cut {info.blocks}"


def remote_model(source: str, trunk: str = ADDRESS, **options: Any) -> ClientPart:
    """The model of `reach`, to generate and to evaluate: `model(ids)`, `generate` and pipelines.

    It opens its sessions by itself. The link is closed when the model is garbage-collected, and
    the server then ends the sessions. To train, use `reach`.

    Args:
        source: As in `reach`, also for errors.
        trunk: The server's address.
        options: Other keyword arguments of `reach`.
    """
    reached = reach(source, trunk, **options)
    connect(reached.model, EvaluationTrunk(reached.trunk))
    weakref.finalize(reached.model, reached.link.close)
    return reached.model
