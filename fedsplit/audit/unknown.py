"""Client weights that a server does not know, and what it makes up in their place.

Shapes: B sequences, T tokens.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.audit.scene import Scene
from fedsplit.randomness import rng_scope

_BATCH = 8
_LR = 3e-3


def personal(scene: Scene, steps: int) -> PreTrainedModel:
    """Return the model of a client that has trained its weights for some steps by itself.

    Args:
        scene: The run, whose weights the server knows.
        steps: The number of steps.
    """
    whole = copy.deepcopy(scene.whole)
    _train(whole, _is_trunk(scene), scene.public_BT.flip(0), steps)
    return whole


def surrogate(scene: Scene, steps: int) -> PreTrainedModel:
    """Return the trunk with other client weights, which were trained around it on public text.

    Li et al. 2023, "Passive Inference Attacks on Split Learning via Adversarial Regularization",
    NDSS 2025, arXiv 2310.10483, train a simulator in this way, with an adversary as well.

    Args:
        scene: The run, of which the server knows the trunk and the public text.
        steps: The number of steps.
    """
    is_trunk = _is_trunk(scene)
    with rng_scope("surrogate"):
        whole = type(scene.whole)(copy.deepcopy(scene.whole.config))
    known = scene.whole.state_dict()
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            if is_trunk(name):
                tensor.copy_(known[name])
    _train(whole, is_trunk, scene.public_BT, steps)
    return whole


def _is_trunk(scene: Scene) -> Callable[[str], bool]:
    client = scene.parts().client
    prefixes = tuple(f"{client.plan.blocks}.{block}." for block in client.trunk_blocks)
    return lambda name: name.startswith(prefixes)


def _train(
    whole: PreTrainedModel, is_frozen: Callable[[str], bool], text_BT: Tensor, steps: int
) -> None:
    trained = [p for name, p in whole.named_parameters() if not is_frozen(name)]
    optimizer = torch.optim.AdamW(trained, lr=_LR, weight_decay=0.0)
    whole.train(False)  # without dropout, which an attacker has no use for
    for step in range(steps):
        first = step * _BATCH % max(1, len(text_BT) - _BATCH + 1)
        ids_BT = text_BT[first : first + _BATCH]
        optimizer.zero_grad()
        whole(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()
    whole.zero_grad()
