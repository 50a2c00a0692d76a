"""Local losses: no gradient passes through the trunk; the bottom trains on an auxiliary head.

Han, Bhatti, Lee and Moon 2021, "Accelerating Federated Learning with Split Learning on Locally
Generated Losses", ICML Workshop on Federated Learning for User Privacy and Data Confidentiality:
clients train their part on an auxiliary head and do not wait for the server's gradients.
Belilovsky, Eickenberg and Oyallon 2020, "Decoupled Greedy Learning of CNNs", ICML, arXiv
1901.08164, show that such a loss can replace the loss of the whole model. There the server's part
trains as well, on labels that the clients send. Here labels never leave a client, so the trunk is
frozen, and the client's top trains on the trunk's output. No gradients are sent, which halves the
traffic.
"""

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.objective import ClientObjective, Prediction
from fedsplit.data import TASKS
from fedsplit.errors import ConfigError
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.model.auxiliary import auxiliary_head_of
from fedsplit.spec import RunSpec


class LocalObjective(ClientObjective):
    """The model's loss, which trains the top, plus the auxiliary head's, which trains the bottom.

    The trunk's output is a constant in mode `isolated`, so no other parameter gets a gradient from
    both, unless the model ties the weights of its head to those of its embedding.

    Raises:
        ConfigError: The model has no auxiliary head.
    """

    trains_bottom: ClassVar = True

    def __init__(self, model: PreTrainedModel, run: RunSpec) -> None:
        super().__init__(model, run)
        self._head = auxiliary_head_of(model)

    def loss(self, prediction: Prediction) -> Tensor:
        """Return the sum of both losses."""
        logits = self._head(prediction.inputs.get("attention_mask"))
        smoothing = self.run.train.label_smoothing
        # One backward for both: the trunk's output is a constant, so each trains its own part.
        local = TASKS[self.run.task].loss(logits, prediction.labels, smoothing)
        return prediction.loss + local


class LocalLoss(SplitStrategy):
    """`SplitStrategy` with `LocalObjective`, for a run in mode `isolated`."""

    client_objective: ClassVar = LocalObjective

    def check(self) -> None:
        """Raise an error unless bottom and top train apart.

        Raises:
            ConfigError: `train.mode` is not `isolated`.
        """
        super().check()
        if self.run.train.mode != "isolated":
            raise ConfigError(
                f"LocalLoss with train.mode={self.run.train.mode} would train on the gradients "
                "that it does without; set train.mode=isolated, or use strategy=splitfed_v2"
            )
