"""What parts do when peft or transformers load an adapter into one of them: they refuse."""

from typing import Any, NoReturn

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from fedsplit.errors import ConfigError


class WholeAdaptersOnly(nn.Module):
    """A base of both parts that refuses adapters of the other part.

    peft and transformers ignore tensors that a model does not have. So they would load one part's
    share of an adapter of the unsplit model, and the other part would compute without it.
    """

    def holds(self, module: str) -> bool:
        """Whether this part holds the module of this name."""
        raise NotImplementedError

    def load_adapter(self, *args: Any, **options: Any) -> Any:
        """Refuse; an override of transformers' method.

        Raises:
            ConfigError: Always; names the function that loads an adapter into parts.
        """
        _refuse("load_adapter of transformers loads an adapter into one part only")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Refuse adapters of the other part; `PeftModel.from_pretrained` comes here."""
        marks = tuple(f".{mark}" for mark in set(PEFT_TYPE_TO_PREFIX_MAPPING.values()) if mark)
        for key in state_dict:
            name = key.removeprefix(prefix)
            if any(mark in name for mark in marks) and not self.holds(name):
                _refuse(f"the adapter has a tensor '{name}', which is in the other part")
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(
        f"{problem}; call fedsplit.model.lora.load_adapter(part, source) for the client, and for "
        "the trunk where it is (a server has --adapter)"
    )
