"""The states that a client saves while it trains, to go back with a trunk that was restarted.

A trunk saves its state when its version reaches a multiple of `save_every`, and is restarted with
one of these versions. A client's state belongs to all versions from that of its last step to the
one before its next step. So the client saves its state when its next step was accepted, and before
its own optimizer steps, if the trunk may have saved one of these versions.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsplit.client.progress import FitProgress
from fedsplit.client.remote import RemoteTrunk
from fedsplit.client.scaling import LossScale
from fedsplit.client.unsplit import NoTrunk
from fedsplit.data.batches import Batch
from fedsplit.errors import CheckpointError, ConfigError, ServerRestarted, StorageError
from fedsplit.optimization import PartOptimizer
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_WEIGHTS, _MOMENTS, _REFERENCES = GROUPS = ("weights", "moments", "references")


class StateStore(Protocol):
    """Keeps the last states of a client; `fedsplit.serve.StateFolder` keeps them on disk."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of the states that are kept, in ascending order."""

    def save(
        self, number: int, facts: Mapping[str, Any], tensors: dict[str, dict[str, Tensor]]
    ) -> None:
        """Keep a state, and drop the oldest ones."""

    def load(
        self, number: int, groups: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Return the facts and tensors of a state, or raise a CheckpointError."""

    def remove_after(self, number: int) -> None:
        """Drop the states above a number; -1 drops all."""


class Trainer(Protocol):
    """What a rollback sets of a `fedsplit.client.trainer.ClientTrainer`.

    Dropout at both sides follows from the steps and the calls, so there is no state of a generator.
    """

    optimizer: PartOptimizer
    steps: int
    loss_scale: LossScale


class Rollback:
    """Saves the states of one call of `fit`, and goes back to them.

    Args:
        trainer: The client's trainer.
        trunk: Its trunk.
        run: The run.
        store: Where the states are kept; those of an earlier call are removed.
        batches: The groups of batches of the fit.

    Attributes:
        progress: The progress of the fit before the present step.

    Raises:
        ConfigError: The trunk does not train, or the batches are no sequence.
        StorageError: The earlier states cannot be removed.
    """

    def __init__(
        self,
        trainer: Trainer,
        trunk: RemoteTrunk | NoTrunk,
        run: RunSpec,
        store: StateStore,
        batches: Iterable[Sequence[Batch]],
    ) -> None:
        if isinstance(trunk, NoTrunk) or run.train.mode != "joint":
            raise ConfigError("states= is for a trunk that trains (train.mode=joint); leave it out")
        if not isinstance(batches, Sequence):
            raise ConfigError(
                "fit with states= may repeat batches; give it a sequence, such as a list, and not "
                f"a {type(batches).__name__}"
            )
        self._trainer = trainer
        self._trunk = trunk
        self._train = run.train
        self._store = store
        self._batches = batches
        self._seen = ""
        self.progress = FitProgress()
        store.remove_after(-1)

    def groups_from(self, number: int) -> Iterator[Sequence[Batch]]:
        """Yield the groups of batches from this one on."""
        for place in range(number, len(self._batches)):
            yield self._batches[place]

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context for the trunk's step, after which the client's own step follows.

        The client's state is saved if the trunk may have saved a version that it belongs to.
        """
        # The trunk's step changes both.
        first, references = self._trunk.instance.own_version, self._trunk.encoder_state
        yield
        instance = self._trunk.instance
        last, every = self._trunk.version - 1, instance.save_every
        is_saved = every > 0 and last // every > (first - 1) // every
        # A server that has just been started may come back with the version it has now.
        if is_saved or self._seen != instance.id:
            self._seen = instance.id
            self._save(first, last, references)

    def _save(self, first: int, last: int, references: Mapping[str, Tensor]) -> None:
        trainer = self._trainer
        facts = {
            "last_version": last,
            "steps": trainer.steps,
            "loss_scale": asdict(trainer.loss_scale),
            "progress": asdict(self.progress),
        }
        tensors = {
            _WEIGHTS: {name: p.detach() for name, p in trainer.optimizer.parameters.items()},
            _MOMENTS: trainer.optimizer.state(),
            _REFERENCES: dict(references),
        }
        try:
            self._store.save(first, facts, tensors)
        # Training can go on; a rollback to this version will say that its state is missing.
        except StorageError as exc:
            log.error("the client's state of version %d is not saved: %s", first, exc)

    def go_back(self, reason: ServerRestarted, round: int) -> FitProgress:
        """Go back to the version that the server was started with, and open a session.

        Returns:
            The progress from which the fit continues.

        Raises:
            ServerRestarted: There is no intact state of this version.
            FedsplitError: The session cannot be opened.
        """
        while True:
            progress = self._restore(reason)
            try:
                self._trunk.open(round, first_call=progress.next_call)
            except ServerRestarted as again:
                reason = again
            else:
                return progress

    def _restore(self, reason: ServerRestarted) -> FitProgress:
        version, numbers = self._trunk.instance.kept_version, self._store.numbers
        missing = ServerRestarted(
            f"{reason}; this client has states of the versions {numbers}, and none of {version}"
        )
        if not (older := [number for number in numbers if number <= version]):
            raise missing
        first = older[-1]
        try:
            facts, tensors = self._store.load(first, GROUPS)
        except CheckpointError as exc:
            raise ServerRestarted(f"{reason}; {exc}") from exc
        if version > facts["last_version"]:
            raise missing
        log.warning("%s goes back to version %d: %s", self._trunk.client, version, reason)
        trainer = self._trainer
        with torch.no_grad():
            for name, parameter in trainer.optimizer.parameters.items():
                parameter.copy_(tensors[_WEIGHTS][name])
        # Another optimizer, because the state may be from before its first step.
        trainer.optimizer = PartOptimizer(trainer.optimizer.parameters, self._train)
        trainer.optimizer.load_state(tensors[_MOMENTS])
        trainer.steps, trainer.loss_scale = facts["steps"], LossScale(**facts["loss_scale"])
        self._trunk.instance.own_version = first
        self._trunk.encoder.load_state(tensors[_REFERENCES])
        self._store.remove_after(first)
        return FitProgress(**facts["progress"])
