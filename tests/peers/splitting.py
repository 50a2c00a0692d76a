"""Models of a family that are split as they are made, for suites that make models themselves."""

import copy
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedsplit.client.remote import RemoteTrunk
from fedsplit.link import LocalLink
from fedsplit.model import ClientPart, connect, split_model
from fedsplit.model.checkpoint import load_part
from fedsplit.model.part_files import WEIGHTS
from fedsplit.spec import RunSpec, SplitSpec
from fedsplit.trunk.service import TrunkService

SPLIT = SplitSpec.parse("1/*/1")
OPTIONS = ("dtype", "attn_implementation")


def client_of(whole: PreTrainedModel) -> ClientPart:
    """The client's part of a model; its trunk is behind a link and closes with the part."""
    parts = split_model(whole, SPLIT)
    if parts.trunk.device.type == "meta":  # it has no values, so it cannot be served
        return parts.client
    run = RunSpec(split=SPLIT)
    with ExitStack() as opening:
        service = opening.enter_context(TrunkService(parts.trunk, run))
        link = LocalLink(service, service.admit("client-0"))
        trunk = RemoteTrunk(link, parts.client, run, client="client-0")
        trunk.open()
        connect(parts.client, trunk)
        weakref.finalize(parts.client, opening.pop_all().close)
    return parts.client


def connected_copy(original: Any) -> Any:
    """A copy; that of a client's part is connected to the trunk of the original."""
    copied = copy.deepcopy(original)
    if isinstance(original, ClientPart):
        copied.remote.connection = original.remote.connection
    return copied


def split_class(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class that a suite takes for the family's and that makes the client's parts.

    A part that the suite saves and loads is connected to the trunk of the part made last.
    """
    made: list[ClientPart] = []

    def split(whole: PreTrainedModel) -> ClientPart:
        made[:] = [client_of(whole)]
        return made[0]

    def new(cls: type[Any], *args: Any, **kwargs: Any) -> ClientPart:
        return split(family(*args, **kwargs))

    def from_pretrained(
        cls: type[Any], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        source = pretrained_model_name_or_path
        if source is None or not (Path(source) / WEIGHTS).exists():
            loaded = family.from_pretrained(source, *args, **kwargs)
            return (split(loaded[0]), loaded[1]) if isinstance(loaded, tuple) else split(loaded)
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        part = load_part(source, **options)
        assert isinstance(part, ClientPart)
        part.remote.connection = made[0].remote.connection
        return (part, {"missing_keys": set()}) if kwargs.get("output_loading_info") else part

    body = {
        "__module__": family.__module__,
        "__new__": new,
        "from_pretrained": classmethod(from_pretrained),
    }
    return type(family.__name__, (family,), body)
