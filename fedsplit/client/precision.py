"""The precision that a client's forwards ask of their trunk: that of the client's own autocast."""

import logging

import torch

from fedsplit.model.acceleration import precision_of
from fedsplit.spec import ModelSpec
from fedsplit.wire.messages import AUTOCAST

log = logging.getLogger(__name__)


class Precision:
    """Has the trunk compute as if it were under the `torch.autocast` of the client's model.

    Autocast belongs to a thread, so the trunk's thread is not under it. A trunk whose run sets
    `model.autocast` keeps that precision. A client that computes in another one is warned once.

    Args:
        model: The options of the client's run.
    """

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._warned: set[str] = set()

    def of_forward(self, device: torch.device, trunk: str) -> str:
        """The precision to ask for; empty for that of the trunk's run, or else of its weights.

        Args:
            device: The device of the client's model.
            trunk: The precision of the trunk's run; empty if it has none.
        """
        own = autocast_on(device)
        if not trunk:
            return own
        # With model.autocast=auto, each side chooses for its own device.
        wanted = precision_of(self._model, device) or trunk
        if own != wanted:
            self._warn(
                f"the trunk computes in {trunk}, because its run sets model.autocast, and this "
                f"client in {own or 'the precision of its weights'}; run the client's model under "
                f"torch.autocast with {wanted}, or set model.autocast=off at both sides, and the "
                "trunk does as the client"
            )
        return ""

    def check_cut(self, hidden: torch.dtype, wire: torch.dtype, device: torch.device) -> None:
        """Warn once if autocast has rounded the hidden states, which the trunk adds to in `wire`.

        It does so in families that project their embeddings to the width of the blocks.
        """
        if hidden != wire and _name(hidden) == autocast_on(device):
            self._warn(
                f"under autocast, this family's hidden states at the cut are in {_name(hidden)}, "
                "and the "
                f"trunk continues with them in {_name(wire)}; so the results differ from the "
                "unsplit model's by roundings to that type; train without autocast for equal ones"
            )

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)


def may_overflow(client: str, trunk: str, wire: torch.dtype) -> bool:
    """Whether gradients pass through float16: by either side's autocast, or as `wire` is it."""
    return "float16" in (client, trunk, _name(wire))


def autocast_on(device: torch.device) -> str:
    """The name of this thread's autocast dtype; empty if autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    name = _name(torch.get_autocast_dtype(device.type))
    return name if name in AUTOCAST else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
