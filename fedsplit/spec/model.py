"""The settings of a model: its source, its cut, and its adapters."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import AtLeast, Matching, OneOf, Within, check_fields

# The hub's cache has a file of this name.
_REVISION = re.compile(r"(?!.*\.\.)[\w@][\w@/.+-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """The number of blocks of each part.

    >>> SplitSpec.parse("1/2/1").cut(4)
    (1, 3)
    >>> SplitSpec.parse("2/*/1").cut(12)
    (2, 11)

    Attributes:
        bottom (blocks): The first blocks, which the client has.
        trunk (blocks): The blocks of the trunk (0: all the other blocks).
        top (blocks): The last blocks, which the client has.
    """

    bottom: Annotated[int, AtLeast(1)] = 1
    trunk: Annotated[int, AtLeast(0)] = 0
    top: Annotated[int, AtLeast(1)] = 1

    def __post_init__(self) -> None:
        check_fields(self, "split")

    @staticmethod
    def parse(text: str) -> "SplitSpec":
        """Read `bottom/trunk/top`, where the trunk may be `*` (all the other blocks).

        Raises:
            ConfigError: The text is not three numbers.
        """
        # Python reads no number of thousands of digits.
        found = re.fullmatch(r"(\d{1,18})/(\d{1,18}|\*)/(\d{1,18})", text.strip())
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

    Attributes:
        pretrained: The hub id or local directory of a checkpoint. It takes precedence over
            model.family.
        revision: The branch, tag or commit of a hub id.
        family: The model type in transformers of a model from scratch, such as llama.
        config: Fields of the family's own Hugging Face config, for a model from scratch.
        attention: The implementation of attention in transformers. auto is the fastest of
            flash_attention_2, sdpa and eager that the family, the device and the precision allow.
        dtype: The type of weights and of the tensors on the wire.
        autocast: The smaller type of matrix products in training and evaluation. auto is bfloat16
            on devices that support it and float16 on others, and each side chooses for its own
            device. If either side uses float16, losses are scaled. With off, the trunk does as
            torch.autocast around the client's model says.
        quantize: The bits of the trunk's frozen linear layers, on which adapters train: nf4 has
            4, int8 has 8, and off leaves them in model.dtype. It needs the extra quantize at the
            server.
        quantize_client: The same for the frozen layers of the client's blocks. It needs the extra
            at clients and server.
    """

    pretrained: str = ""
    revision: Annotated[
        str,
        Matching(_REVISION, "letters, digits and any of _ @ / . + -, without two dots in a row"),
    ] = "main"
    family: str = "gpt2"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    attention: Annotated[str, OneOf("auto", "flash_attention_2", "sdpa", "eager")] = "sdpa"
    dtype: Annotated[str, OneOf("float32", "bfloat16", later=("float16",))] = "float32"
    autocast: Annotated[str, OneOf("off", "auto", "bfloat16", "float16")] = "off"
    quantize: Annotated[str, OneOf("off", "nf4", "int8")] = "off"
    quantize_client: Annotated[str, OneOf("off", "nf4", "int8")] = "off"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if not self.pretrained and not self.family:
            raise ConfigError("model.pretrained and model.family are both empty; set one of them")

    def __str__(self) -> str:
        return self.pretrained or f"{self.family} from scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """LoRA adapters in place of full training.

    Attributes:
        enabled: Whether adapters train in place of all weights.
        rank: The rank of the adapters' matrices.
        alpha: The scale of the adapters, which are multiplied by alpha / rank.
        dropout: The probability of dropout before an adapter.
        targets: The names of the modules that get an adapter, with commas. As in peft, the
            value may also be all-linear (all linear layers but the head) or a regular expression
            for full names in the unsplit model; auto is peft's default for the family.
        bottom: Whether the bottom gets adapters.
        trunk: Whether the trunk gets adapters.
        top: Whether the top gets adapters.
    """

    enabled: bool = False
    rank: Annotated[int, AtLeast(1)] = 8
    alpha: Annotated[int, AtLeast(1)] = 16
    dropout: Annotated[float, Within(0.0, 1.0)] = 0.0
    targets: str = "auto"
    bottom: bool = True
    trunk: bool = True
    top: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        if self.enabled and not (self.bottom or self.trunk or self.top):
            raise ConfigError(
                "lora.bottom, lora.trunk and lora.top are all false: nothing would train"
            )
