"""Connects a client's part of a model to a trunk that is served without Flower."""

import secrets
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from fedsplit.client.remote import RemoteTrunk
from fedsplit.errors import ConfigError, ModelMismatch
from fedsplit.model import ClientPart, connect
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.model.describe import client_of
from fedsplit.model.lora import load_adapter
from fedsplit.model.placement import on_device
from fedsplit.model.source import Source
from fedsplit.serve.shared import ADDRESS, pretrained_run
from fedsplit.spec import RunSpec, SplitSpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import ServiceInfoRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reached:
    """A client's model, connected to a trunk that is served: `model.generate`, or train it.

    `trunk` is what `ClientTrainer` takes beside the model, and `link` counts bytes. A context:
    at its end the link is closed.
    """

    model: ClientPart
    trunk: RemoteTrunk
    link: GrpcLink

    def __enter__(self) -> "Reached":
        return self

    def __exit__(self, *_: object) -> None:
        self.trunk.disconnect()
        self.link.close()


def reach(
    source: str,
    trunk: str = ADDRESS,
    *,
    served: str = "",
    adapter: str = "",
    token: str = "",
    tls_ca: str = "",
    kv: str = "server",
    run: RunSpec | None = None,
    revision: str = "main",
    device: str = "cpu",
) -> Reached:
    """Build the client's part of a model, cut where the server cut it, and connect the two.

    Args:
        source: Directory or hub id of the whole model; only the client's tensors are read.
        trunk: The server's address.
        served: The trunk's name there; the server's first by default.
        adapter: Directory or hub id of the peft adapter that this trunk is served with.
        token: The server's token, if it asks for one.
        tls_ca: PEM of the authority to trust, where the server has TLS.
        kv: Who keeps the trunk's keys and values: `server`, or `client`.
        run: To train: the run that the server was configured with; its split is the server's.
        revision: Of a hub id.
        device: Of the client's part, as torch names it.

    Raises:
        ModelMismatch: The server serves another model, or nothing of this name.
        FedsplitError: The server cannot be reached, or the model not be read.
    """
    run = run or RunSpec()
    wire = replace(run.wire, bind=WireSpec().bind, tls_cert="", tls_key="", tls_ca=tls_ca)
    link = GrpcLink(trunk, token=token, wire=wire)
    with ExitStack() as on_failure:
        on_failure.callback(link.close)
        info = link.exchange(ServiceInfoRequest(served=served))
        run = replace(run, split=SplitSpec.parse(info.blocks))
        config = Source(name=source, revision=revision).config()
        if not _is_of(info.model, config, run.split):
            raise ModelMismatch(
                f"{source} is not the model of which {trunk} serves the trunk (a {info.family} cut "
                f"{info.blocks}); name the same model at both sides, or another one of what it "
                f"serves: {', '.join(info.served)}"
            )
        client = client_of(pretrained_run(run, source, revision, adapter), config, device)
        if adapter:
            load_adapter(client, adapter)
        on_device(client, device).eval()  # type: ignore[no-untyped-call]
        name = f"client-{secrets.token_hex(8)}"
        remote = RemoteTrunk(link, client, run, client=name, served=served, kv=kv)
        connect(client, remote)
        on_failure.pop_all()
    return Reached(model=client, trunk=remote, link=link)


def _is_of(fingerprint: str, config: PretrainedConfig, split: SplitSpec) -> bool:
    try:
        return model_fingerprint(config, split) == fingerprint
    except ConfigError:  # it has not as many blocks as are cut there
        return False


def remote_model(source: str, trunk: str = ADDRESS, **options: Any) -> ClientPart:
    """The model of `reach`, for `generate` and pipelines of transformers; lets go by itself.

    Args:
        source: As in `reach`, and so are errors.
        trunk: The server's address.
        options: The others of `reach`, by name.
    """
    reached = reach(source, trunk, **options)
    weakref.finalize(reached.model, reached.link.close)
    return reached.model
