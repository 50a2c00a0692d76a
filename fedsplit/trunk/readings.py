"""What a trunk tells of its state: the readings of its engine, and replies that only read."""

from collections.abc import Mapping

from torch import Tensor

from fedsplit.model.stage import TrunkPart
from fedsplit.optimization import block_norms
from fedsplit.spec import RunSpec
from fedsplit.telemetry.events import CacheState
from fedsplit.trunk.generation import Generation
from fedsplit.trunk.norm_guard import GuardCounts
from fedsplit.trunk.scheduler import Scheduler
from fedsplit.trunk.training import Training
from fedsplit.wire import messages as m


class EngineReadings:
    """The readings of `fedsplit.trunk.engine.TrunkEngine`, which any thread may ask for.

    The engine sets the attributes.

    Attributes:
        training: Parameters, graphs and contributions; for the engine's thread alone.
    """

    training: Training
    _generation: Generation
    _scheduler: Scheduler
    _run: RunSpec

    @property
    def now(self) -> float:
        """The time of the clock that policies use, in seconds."""
        return self._scheduler.now

    @property
    def version(self) -> int:
        """The current parameter version: optimizer steps taken, summed over replicas."""
        return self.training.version

    @property
    def short_steps(self) -> int:
        """The number of steps without a client that was awaited until `policy.deadline_s`."""
        return self.training.barrier.short

    @property
    def guard_counts(self) -> GuardCounts:
        """What the guard has clipped and refused so far."""
        return self.training.quarantine.counts

    @property
    def steps(self) -> int:
        """The position of the learning rate schedule: the largest step count of the clients."""
        return self.training.steps

    @property
    def stashed_bytes(self) -> int:
        """Bytes of activations that are kept for outstanding backwards."""
        return self.training.stash_state.num_bytes

    @property
    def cache_state(self) -> CacheState:
        """The bytes of keys and values, and how often they were found."""
        return self._generation.cache_state

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the sessions that generate."""
        return self.cache_state.num_bytes

    @property
    def num_waiting(self) -> int:
        """The number of calls that wait for a barrier, or for their time."""
        return self._scheduler.num_waiting

    def in_use(self) -> dict[str, str]:
        """Return how much of each budget is in use, by the setting that limits it."""
        generation, tokens = self._run.generation, self._generation.most_tokens
        return {
            "replicas": f"{self.training.num_replicas} of {self._run.clients}",
            "wire.stash_bytes": f"{self.stashed_bytes} of {self._run.wire.stash_bytes}",
            "generation.cache_bytes": f"{self.cache_bytes} of {generation.cache_bytes}",
            "generation.session_tokens": f"{tokens} of {generation.session_tokens}",
        }


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

    def __init__(self, trunk: TrunkPart, run: RunSpec, engine: EngineReadings, model: str) -> None:
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
