"""The state of a model in memory that its config and its saved tensors do not have."""

import copy
import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fedsplit.errors import UnsupportedModel
from fedsplit.model.pass_through import PassThrough

log = logging.getLogger(__name__)

_SETTINGS = (bool, int, float, str, type(None))
_FUNCTIONS = ("_gradient_checkpointing_func", "_loss_function")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# transformers installs its hooks for `output_hidden_states` at the first use, also in a part.
_CAPTURING = "transformers.utils.output_capturing"
_CAPTURES = "_output_capturing_hooks_installed"


def copy_state(whole: PreTrainedModel, part: PreTrainedModel, *, dtypes: bool) -> None:
    """Give a part the state of the unsplit model in memory.

    That is the mode and the settings of every module (such as rates of dropout, and activation
    checkpointing), the loss, the parameters that are frozen, and the settings of generation. Hooks
    may refer to the unsplit model, so they are not copied; a warning names them.

    Args:
        whole: The unsplit model.
        part: A part with its tensors.
        dtypes: Whether each parameter and buffer also gets its dtype in the unsplit model.

    Raises:
        UnsupportedModel: A module was replaced by one of another class.
    """
    _copy_settings(whole, part)
    for name, parameter in part.named_parameters(remove_duplicate=False):
        theirs = whole.get_parameter(name)
        parameter.requires_grad_(theirs.requires_grad)
        if dtypes and parameter.dtype != theirs.dtype:
            parameter.data = theirs.detach().clone()
    # Buffers that are not saved too: `model.half()` converts them, and they would be made anew.
    for name, _ in list(part.named_buffers()) if dtypes else ():
        owner, _, leaf = name.rpartition(".")
        part.get_submodule(owner)._buffers[leaf] = whole.get_buffer(name).detach().clone()
    part.config.name_or_path = whole.config.name_or_path
    if part.can_generate() and whole.can_generate():
        part.generation_config = copy.deepcopy(whole.generation_config)


def _copy_settings(whole: PreTrainedModel, part: PreTrainedModel) -> None:
    modules = dict(whole.named_modules(remove_duplicate=False))
    hooked = []
    for name, module in part.named_modules():
        theirs = modules[name]
        module.training = theirs.training
        # A pass-through computes nothing, so it has no settings.
        if isinstance(module, PassThrough):
            continue
        if name and not isinstance(module, type(theirs)):
            raise UnsupportedModel(
                f"{type(whole).__name__}: its '{name}' is {type(theirs).__name__}, but a part has "
                f"{type(module).__name__} there; split the model before you replace modules"
            )
        vars(module).update(_settings_of(theirs))
        if _is_hooked(theirs):
            hooked.append(name or "the model itself")
    if hooked:
        log.warning(
            "%s: the hooks of %d modules (such as %s) are not in its parts; register them there",
            type(whole).__name__,
            len(hooked),
            hooked[0],
        )


def _settings_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if (isinstance(value, _SETTINGS) and name != _CAPTURES) or name in _FUNCTIONS
    }


def _is_hooked(module: nn.Module) -> bool:
    # Libraries that place a model on devices replace `forward` too; the parts are placed anew.
    is_replaced = "forward" in vars(module) and "_hf_hook" not in vars(module)
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return is_replaced or any(getattr(h, "__module__", "") != _CAPTURING for h in hooks)
