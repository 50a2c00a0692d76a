"""The model that a client could train without any trunk: its own blocks, one after another."""

import copy
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import UnsupportedModel
from fedsplit.model.build import load_tensors
from fedsplit.model.stage import ClientPart

_NUM_BLOCKS = "num_hidden_layers"


def without_trunk(client: ClientPart, **options: Any) -> PreTrainedModel:
    """Return a model of the client's family that has the client's blocks and no others.

    It is an ordinary model of the family, with fewer blocks.

    Args:
        client: The part; its tensors are used without a copy.
        options: For `from_pretrained`: dtype, attn_implementation.

    Raises:
        UnsupportedModel: The number of blocks is no field of the family's config.
    """
    config = _shortened(client)
    prefix = f"{client.plan.blocks}."
    places = {block: place for place, block in enumerate(client.held_blocks)}

    def renamed(name: str) -> str:
        if not name.startswith(prefix):
            return name
        block, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{places[int(block)]}.{rest}"

    tensors = {renamed(name): tensor for name, tensor in client.state_dict().items()}
    family: type[PreTrainedModel] = client.family
    return load_tensors(family, config, tensors, "the client's part", **options)


def _shortened(client: ClientPart) -> PretrainedConfig:
    """Return the config of the unsplit model with the client's blocks alone."""
    config = copy.deepcopy(client.config)
    text = config.get_text_config(decoder=True)
    num_blocks, held = client.plan.num_blocks, client.held_blocks
    if getattr(text, _NUM_BLOCKS, None) != num_blocks:
        raise UnsupportedModel(
            f"{client.family.__name__}: {_NUM_BLOCKS} of its config is not the number of its "
            f"blocks, {num_blocks}, so a model with the client's blocks alone cannot be made"
        )
    # Such as the kinds of attention, one of each block.
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == num_blocks:
            setattr(text, name, [value[block] for block in held])
    setattr(text, _NUM_BLOCKS, len(held))
    return config
