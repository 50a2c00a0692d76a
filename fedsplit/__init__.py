"""Federated split learning of Hugging Face models: the public names.

A name is imported at its first use, so importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsplit.client.remote import RemoteTrunk
    from fedsplit.client.trainer import ClientTrainer
    from fedsplit.errors import FedsplitError, UnsupportedModel
    from fedsplit.link import Link, LocalLink
    from fedsplit.model import SplitModel, connect, join_model, split_model
    from fedsplit.spec import RunSpec, SplitSpec
    from fedsplit.trunk.service import TrunkService

# The module of each public name.
_HOMES = {
    "ClientTrainer": "fedsplit.client.trainer",
    "FedsplitError": "fedsplit.errors",
    "Link": "fedsplit.link",
    "LocalLink": "fedsplit.link",
    "RemoteTrunk": "fedsplit.client.remote",
    "RunSpec": "fedsplit.spec",
    "SplitModel": "fedsplit.model",
    "SplitSpec": "fedsplit.spec",
    "TrunkService": "fedsplit.trunk.service",
    "UnsupportedModel": "fedsplit.errors",
    "connect": "fedsplit.model",
    "join_model": "fedsplit.model",
    "split_model": "fedsplit.model",
}

__all__ = [
    "ClientTrainer",
    "FedsplitError",
    "Link",
    "LocalLink",
    "RemoteTrunk",
    "RunSpec",
    "SplitModel",
    "SplitSpec",
    "TrunkService",
    "UnsupportedModel",
    "connect",
    "join_model",
    "split_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"fedsplit has no public name {name!r}; see fedsplit.__all__")
    return getattr(import_module(_HOMES[name]), name)
