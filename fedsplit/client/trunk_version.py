"""The trunk's version in the state dict of a client's model, and in those of the model's copies."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedsplit.model.part_files import TRUNK_VERSION
from fedsplit.model.stage import ClientPart

STAND_IN = "trunk_stand_in"
"""The parameter that stands for the trunk; it is in no file."""


class VersionStamp(ABC):
    """Two hooks of a client's model: they add the stamp to its state dict, and check it at loading.

    A stamp is the trunk's version that the weights belong to, and the number of the client's steps.
    A deep copy of the model has no trunk, so it gets a `CopiedStamp`.
    """

    @property
    @abstractmethod
    def stamp(self) -> Sequence[int]:
        """The stamp of the model's weights; empty if it is not known."""

    @abstractmethod
    def load_stamp(self, saved: Sequence[int]) -> None:
        """Take over the stamp of weights that are about to be loaded; empty if they have none."""

    def stamp_state_dicts(self, model: ClientPart) -> list[Any]:
        """Register the hooks; return their handles."""
        module: Any = model
        return [
            # torch sets an attribute of the hook, which a bound method does not take.
            module.register_state_dict_post_hook(functools.partial(self._add)),
            module.register_load_state_dict_pre_hook(self._take),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiedStamp":
        return CopiedStamp(self.stamp)

    def _add(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        state_dict.pop(prefix + STAND_IN, None)
        if stamp := self.stamp:
            state_dict[prefix + TRUNK_VERSION] = torch.tensor([*stamp])

    def _take(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        # torch reports a parameter that is missing.
        state_dict[prefix + STAND_IN] = module.get_parameter(STAND_IN).detach()
        saved = state_dict.pop(prefix + TRUNK_VERSION, None)
        self.load_stamp([] if saved is None else saved.tolist())


class CopiedStamp(VersionStamp):
    """The stamp of a copied model, which stays as it is while the trunk goes on.

    Args:
        stamp: That of the weights at the time of the copy.
    """

    def __init__(self, stamp: Sequence[int]) -> None:
        self._stamp = stamp

    @property
    def stamp(self) -> Sequence[int]:
        """The stamp of the weights that were copied, or loaded later."""
        return self._stamp

    def load_stamp(self, saved: Sequence[int]) -> None:
        """Take over a stamp."""
        self._stamp = saved
