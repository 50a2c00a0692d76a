"""The replies to requests that only read: the service's info, gradients, state of training."""

from collections.abc import Mapping

from torch import Tensor

from fedsplit.model.stage import TrunkPart
from fedsplit.optimization import block_norms
from fedsplit.spec import RunSpec
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.wire import messages as m


class Readings:
    """Makes the replies to requests that only read.

    Args:
        trunk: The trunk part.
        run: The run.
        engine: Its engine.
        model: The fingerprint of config and cut.

    Attributes:
        limits: The largest request that the trunk takes.
    """

    def __init__(self, trunk: TrunkPart, run: RunSpec, engine: TrunkEngine, model: str) -> None:
        self.limits = m.Limits(
            max_rows=run.train.batch_size,
            max_tokens=run.data.sequence_length,
            hidden_size=trunk.config.hidden_size,
            session_tokens=run.generation.session_tokens,
            stateless_bytes=run.generation.stateless_bytes,
        )
        self._family = str(trunk.config.model_type)
        self._run = run
        self._engine = engine
        self._model = model

    def info(
        self, server_instance_id: str, num_sessions: int, budgets: dict[str, str]
    ) -> m.ServiceInfoReply:
        """Describe the service; the budgets are empty for callers without a token."""
        return m.ServiceInfoReply(
            protocol=m.PROTOCOL,
            server_instance_id=server_instance_id,
            model=self._model,
            family=self._family,
            blocks=str(self._run.split),
            version=self._engine.version,
            sessions=num_sessions,
            served_model_names=(),
            limits=self.limits,
            budgets=budgets,
        )

    def training_state(self, round: int) -> m.TrainingStateReply:
        """Describe the state of training; `round` was opened last."""
        position = self._engine.steps
        return m.TrainingStateReply(
            round=round,
            step=position,
            lr=self._run.train.lr_at(position) * self._engine.training.lr_scale,
            version=self._engine.version,
        )


def gradients_reply(
    request: m.GradientsRequest, gradients: Mapping[str, Tensor]
) -> m.GradientsReply:
    """Return the norms of gradients, and the tensors if the request asks for them."""
    return m.GradientsReply(
        norms=block_norms(gradients),
        names=tuple(gradients) if request.tensors else (),
        gradients=tuple(gradients.values()) if request.tensors else (),
    )
