"""The settings of a model: its source, its cut, and its adapters."""

import re
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import at_least, one_of, within


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """The number of blocks of each part; `trunk=0` stands for all the other blocks.

    >>> SplitSpec.parse("1/2/1").cut(4)
    (1, 3)
    >>> SplitSpec.parse("2/*/1").cut(12)
    (2, 11)
    """

    bottom: int = 1
    trunk: int = 0
    top: int = 1

    def __post_init__(self) -> None:
        at_least("split.bottom", self.bottom, 1)
        at_least("split.trunk", self.trunk, 0)
        at_least("split.top", self.top, 1)

    @staticmethod
    def parse(text: str) -> "SplitSpec":
        """Read `bottom/trunk/top`, where the trunk may be `*` (all the other blocks).

        Raises:
            ConfigError: The text is not three numbers.
        """
        found = re.fullmatch(r"(\d+)/(\d+|\*)/(\d+)", text.strip())
        if not found:
            raise ConfigError(
                f"split={text!r} is not of the form bottom/trunk/top, e.g. 1/2/1 or 1/*/1"
            )
        bottom, trunk, top = found.groups()
        if trunk == "0":
            raise ConfigError(f"split={text!r} leaves the trunk no block; it needs at least 1")
        return SplitSpec(bottom=int(bottom), trunk=0 if trunk == "*" else int(trunk), top=int(top))

    def cut(self, num_blocks: int, model: str = "the model") -> tuple[int, int]:
        """Return the first block of the trunk, and the first block after it.

        Args:
            num_blocks: Of the whole model.
            model: Its name, for the error.

        Raises:
            ConfigError: The model does not have the number of blocks that the split needs.
        """
        client_blocks, trunk = self.bottom + self.top, self.trunk
        if client_blocks + max(trunk, 1) > num_blocks:
            raise ConfigError(
                f"split.bottom + split.top = {client_blocks}, but {model} has {num_blocks} blocks "
                f"of which the trunk needs at least {max(trunk, 1)}; lower one of them"
            )
        if trunk and client_blocks + trunk != num_blocks:
            raise ConfigError(
                f"split {self} covers {client_blocks + trunk} blocks, but {model} has "
                f"{num_blocks}; make them equal, or write {self.bottom}/*/{self.top} to give the "
                "trunk all the others"
            )
        return self.bottom, num_blocks - self.top

    def __str__(self) -> str:
        return f"{self.bottom}/{self.trunk or '*'}/{self.top}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A checkpoint to start from, or the family and config of a model from scratch.

    `pretrained` is a hub id or a local directory and takes precedence over `family`; `config` has
    fields of the family's own Hugging Face config.

    `attention` is an implementation of transformers, or `auto` for the fastest of
    flash_attention_2, sdpa and eager that the family, the device and the precision allow. With
    `autocast`, weights and the tensors on the wire keep `dtype`, and matrix products of training
    and evaluation use the smaller type; `auto` is bfloat16 on devices that support it and float16
    on others, and each side chooses for its own device. If either side uses float16, losses are
    scaled.
    """

    pretrained: str = ""
    revision: str = "main"
    family: str = "gpt2"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    attention: str = "sdpa"
    dtype: str = "float32"
    autocast: str = "off"

    def __post_init__(self) -> None:
        attentions = ("auto", "flash_attention_2", "sdpa", "eager")
        one_of("model.attention", self.attention, attentions)
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"), later=("float16",))
        one_of("model.autocast", self.autocast, ("off", "auto", "bfloat16", "float16"))
        if not self.pretrained and not self.family:
            raise ConfigError("model.pretrained and model.family are both empty; set one of them")

    def __str__(self) -> str:
        return self.pretrained or f"{self.family} from scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """LoRA adapters in place of full training.

    `targets` names the modules that get an adapter, with commas. As in peft, it may also be
    `all-linear` (all linear layers but the head) or a regular expression for full names in the
    unsplit model; `auto` is peft's default for the family. Only the parts whose flag is true get
    adapters.
    """

    enabled: bool = False
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: str = "auto"
    bottom: bool = True
    trunk: bool = True
    top: bool = True

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        at_least("lora.alpha", self.alpha, 1)
        within("lora.dropout", self.dropout, 0.0, 1.0)
        if self.enabled and not (self.bottom or self.trunk or self.top):
            raise ConfigError(
                "lora.bottom, lora.trunk and lora.top are all false: nothing would train"
            )
