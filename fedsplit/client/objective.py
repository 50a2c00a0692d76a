"""The objective that a client minimizes; a training method can override it.

Shapes: B sequences, T tokens, C classes (of a language model its vocabulary).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """A forward of the client's model on a batch, on the model's device and with its graph.

    `logits` are [B, T, C], or [B, C] of a classifier. `loss` is the model's own loss, a mean in
    nats over the tokens of the batch; in training it includes `train.label_smoothing`.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    logits: Tensor
    loss: Tensor


class ClientObjective:
    """The loss of the model's output, whose gradient reaches the bottom through the trunk.

    A method with another objective is a subclass; a strategy names it as its `client_objective`.

    `trains_bottom` says whether the objective has a gradient for the bottom that does not come
    from the trunk, as `train.mode=isolated` needs.

    Args:
        model: The client's model.
        run: The run.

    Raises:
        ConfigError: The run does not fit the objective.
    """

    trains_bottom: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, run: RunSpec) -> None:
        self.check(run)
        self.model = model
        self.run = run

    @classmethod
    def check(cls, run: RunSpec) -> None:
        """Raise an error for a run that does not fit the objective.

        Raises:
            ConfigError: `train.mode` is `isolated`, and nothing trains the bottom.
        """
        # With noise at the cut, the residual stream passes by the trunk, and carries a gradient.
        has_bypass = run.privacy.kind != "off"
        if run.train.mode == "isolated" and not (cls.trains_bottom or has_bypass):
            raise ConfigError(
                "train.mode=isolated trains the bottom on a loss at the client, but "
                f"{cls.__name__} has no such loss; use strategy=local_loss, or "
                "train.mode=frozen_trunk, in which the trunk returns gradients"
            )

    def loss(self, prediction: Prediction) -> Tensor:
        """Return the loss to minimize, a mean over the tokens of one batch.

        The trainer weights batches by their tokens and adds their gradients. It always reports
        `prediction.loss`, also when another loss is minimized. With `train.micro_batches`, several
        threads call this method.
        """
        return prediction.loss
