"""The names of a checkpoint's tensors, in its files and in the model that transformers builds."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    rename_source_key,
)


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names that the tensors of files have in the model, by their names in the files.

    The function uses the renaming of transformers' loader, which also covers older names and fused
    experts.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    held, prefix = model.state_dict(), model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, held)[0] for name in names}


def compared_parameters(whole: PreTrainedModel, head: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of an unsplit model that are compared with those in files, by their names.

    Tied ones count once. Those that transformers makes of other tensors of a file are left out,
    such as fused experts, and so are those of `head`, the modules that a file need not have.
    """
    changes = get_model_conversion_mapping(whole)
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    backwards: list[Any] = [each.reverse_transform() for each in converters]
    left_out = tuple(f"{name}." for name in head)
    return {
        name: parameter
        for name, parameter in whole.named_parameters(remove_duplicate=False)
        if name not in whole.all_tied_weights_keys
        and not name.startswith(left_out)
        and apply_converters(name, backwards)[1] is None
    }
