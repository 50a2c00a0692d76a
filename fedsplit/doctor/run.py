"""Checks of what a run needs: the model and its cut, the server's fingerprint, and the app."""

import copy
import io
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from transformers import PretrainedConfig

from fedsplit.doctor.machine import mib
from fedsplit.doctor.network import TIMEOUT_S, Answer
from fedsplit.doctor.result import Result, fail, ok, skipped, warn
from fedsplit.errors import ConfigError, FedsplitError, ModelMismatch
from fedsplit.flower.control import App
from fedsplit.model.build import build_client, build_trunk
from fedsplit.model.identity import model_fingerprint, model_settings
from fedsplit.model.plan import model_class_for
from fedsplit.model.source import Source, on_meta
from fedsplit.spec import SplitSpec, WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import PROTOCOL, CloseRequest, OpenRequest, ServiceInfoRequest

# A trunk compares adapters after the weights, which are equal then.
_OTHERWISE_EQUAL = "the trunk has an adapter"
_CONFIG = "conf/config.yaml"
# Kinds of files that Flower bundles and that are not part of an app's code and config.
_DATA = {".json", ".jsonl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model and the size of the part that this machine computes.

    Attributes:
        error: Why it cannot be used; empty if it can.
        config: The whole model's config.
        identity: The digests of its weights.
        part_bytes: The bytes of the part's weights; 0 if there is no split.
    """

    error: str = ""
    config: PretrainedConfig | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    part_bytes: int = 0


def read_model(source: str, revision: str, split: str, *, trunk: bool) -> Model:
    """Read a model's config and the digests of its weights; no weights are loaded.

    Args:
        source: The directory or the hub id.
        revision: The revision of a hub id.
        split: The blocks of bottom, trunk and top; empty if it is not known.
        trunk: Whether the part is the trunk.
    """
    try:
        origin = Source(name=source, revision=revision)
        config = origin.config()
        whole = on_meta(model_class_for(config), copy.deepcopy(config))
        identity = origin.identity(config, whole)
        if not split:
            return Model(config=config, identity=identity)
        build = build_trunk if trunk else build_client
        part = build(config, SplitSpec.parse(split), state_dict=whole.state_dict())
        size = sum(parameter.nbytes for parameter in part.parameters())
        return Model(config=config, identity=identity, part_bytes=size)
    except FedsplitError as exc:
        return Model(error=str(exc))


def check_model(source: str, model: Model | None) -> Result:
    """Check that a model can be read and cut."""
    if model is None:
        return skipped("model", "no --model was given")
    if model.error:
        return fail("model", model.error, "correct --model and --split, or copy the model again")
    size = f"; the part has {mib(model.part_bytes)}" if model.part_bytes else ""
    return ok("model", f"{source} can be read{size}")


def check_fingerprint(
    address: str, tls_ca: str, token: str, model: Model | None, answer: Answer | None
) -> Result:
    """Check that the server's trunk is of the same model, with the same weights."""
    name = "fingerprint"
    if model is None or model.config is None or answer is None or answer.info is None:
        return skipped(name, "it needs --model and a trunk that answers")
    wire = WireSpec(tls_ca=tls_ca, call_deadline_s=TIMEOUT_S)
    served = answer.info.served_model_names or ("",)
    found = []
    try:
        with closing(GrpcLink(address, token=token, wire=wire)) as link:
            for each in served:
                error = _difference(link, each, model)
                if not error:
                    return ok(name, f"the trunk {each or 'there'} is of this model and weights")
                found.append(f"{each}: {error}" if each else error)
    except FedsplitError as exc:
        return skipped(name, str(exc))
    if all(_OTHERWISE_EQUAL in text for text in found):
        return warn(name, "; ".join(found), "name the adapter with --adapter of the commands")
    return fail(
        name,
        "; ".join(found),
        "use the same model, revision, weights and split at both sides (fedsplit info ADDRESS "
        "shows the server's)",
    )


def _difference(link: GrpcLink, served: str, model: Model) -> str:
    """Return in what a trunk differs from a model; empty if in nothing."""
    assert model.config is not None
    info = link.exchange(ServiceInfoRequest(served_model_name=served))
    split = SplitSpec.parse(info.blocks)
    try:
        fingerprint = model_fingerprint(model.config, split)
        settings = model_settings(model.config, split)
    except ConfigError as exc:
        return str(exc)
    if not info.budgets:
        # Without a token, only the fingerprint of config and cut can be compared.
        return "" if fingerprint == info.model else f"a {info.family} with other settings or cut"
    request = OpenRequest(
        protocol=PROTOCOL,
        client="doctor",
        model=fingerprint,
        config="",
        hidden_size=info.limits.hidden_size,
        round=0,
        training=False,
        generating=True,
        served_model_name=served,
        identity=dict(model.identity),
        model_settings=settings,
    )
    try:
        link.exchange(CloseRequest(session=link.exchange(request).session))
    except ModelMismatch as exc:
        return str(exc)
    return ""


def check_app(folder: str) -> Iterable[Result]:
    """Check what Flower would bundle of an app, and send to every SuperNode."""
    if not folder:
        return [skipped("app", "no --app was given")]
    try:
        content = App(Path(folder)).fab.content
    except ConfigError as exc:
        return [fail("app files", str(exc), "give the folder of the app, and do as Flower says")]
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        files = bundle.namelist()
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    components = project["tool"]["flwr"]["app"]["components"]
    return [
        check_app_files(files, components.values()),
        check_app_data(files),
    ]


def check_app_files(files: Collection[str], components: Iterable[str]) -> Result:
    """Check that a bundle has the app's modules, and the configuration of a checkout."""
    modules = [component.partition(":")[0].replace(".", "/") for component in components]
    missing = [
        f"{module}.py"
        for module in modules
        if not {f"{module}.py", f"{module}/__init__.py"} & set(files)
    ]
    if any(name.startswith("fedsplit/") for name in files) and _CONFIG not in files:
        missing.append(_CONFIG)
    if missing:
        return fail(
            "app files",
            f"the bundle lacks {', '.join(missing)}",
            "restore the files; see fab-include and fab-exclude in pyproject.toml, and .gitignore",
        )
    return ok("app files", f"the bundle has {len(files)} files, with all that the app needs")


def check_app_data(files: Collection[str]) -> Result:
    """Check that a bundle has no data, since it is sent to every SuperNode."""
    data = [name for name in files if _is_data(PurePosixPath(name))]
    if data:
        more = f" and {len(data) - 3} more" if len(data) > 3 else ""
        return warn(
            "app data",
            f"the bundle has {', '.join(sorted(data)[:3])}{more}, and every SuperNode gets it",
            "move such files out of the folder, or name them in fab-exclude of pyproject.toml",
        )
    return ok("app data", "the bundle has code, configuration and texts only")


def _is_data(path: PurePosixPath) -> bool:
    # A run config beside the app may name paths and addresses.
    return path.suffix in _DATA or (path.suffix == ".toml" and path.name != "pyproject.toml")
