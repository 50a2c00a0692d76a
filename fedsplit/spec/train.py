"""The settings of training: optimizers, their schedule, rounds, and early stopping."""

import math
from dataclasses import dataclass
from typing import Annotated

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import DURATION, AtLeast, OneOf, Positive, Within, check_fields

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
"""Optimizers that need bitsandbytes."""

# A CUDA graph overwrites its last output, but several outputs wait for their backward here.
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
_COMPILE = OneOf("off", "default", "max-autotune-no-cudagraphs", later=_WITH_CUDA_GRAPHS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """The training settings of a run; clients and trunk use the same ones.

    Attributes:
        rounds (rounds): The number of rounds. Client weights are aggregated after each of them.
        local_steps (steps): The optimizer steps that a client takes in a round.
        local_epochs (epochs): The epochs over its data that a client takes in a round, in place of
            train.local_steps (0: not used).
        max_steps (steps): The most optimizer steps of a client over the whole run, which then is
            also the length of the schedule (0: no limit).
        batch_size (sequences): The size of a batch.
        accumulation (batches): The number of batches per optimizer step.
        micro_batches (pieces): The pieces that a batch is cut into. The three parts process
            different pieces at the same time; the step is the same, up to the rounding of sums.
        optimizer: The optimizer. adamw_8bit stores its moments in 8 bits (extra optimizers), and
            paged_adamw_8bit stores them in memory that is paged out to the CPU when the GPU is
            short of memory.
        lr: The learning rate after the warm-up.
        beta1: The decay of Adam's first moment.
        beta2: The decay of Adam's second moment.
        eps: The term that Adam adds to its denominator.
        momentum: The momentum of sgd.
        weight_decay: The weight decay, which applies to matrices only.
        label_smoothing: The share of the target that is spread over all tokens or classes.
        clip_norm: The largest norm of the gradient (0: no clipping).
        clip: The gradients that train.clip_norm bounds: of all three parts together (global), or
            of the client's parts and of the trunk separately (parts).
        schedule: The learning rate after the warm-up: constant, or falling to 0 at the last step,
            linearly or along half a cosine.
        warmup_steps (steps): The first steps, over which the learning rate rises linearly.
        mode: The parts that train. joint trains all three; frozen_trunk trains bottom and top
            with gradients that pass through a constant trunk; isolated trains the top on the
            trunk's outputs and the bottom on an auxiliary head, and no gradient passes through
            the trunk.
        trunk_steps (steps): The steps that the trunk takes per step of the clients, from stored
            activations.
        evaluate_every (rounds): The rounds from one measurement of the held-out loss to the next.
            It is measured in the last round too.
        patience (measurements): The measured rounds without improvement after which training
            stops (0: it does not stop early).
        load_best: Whether the best measured round is the result, and not the last one.
        save_every (rounds): The rounds from one checkpoint, which resume continues from, to the
            next (0: no checkpoints).
        checkpointing: The parts that store only the inputs of their blocks for the backward and
            compute the rest again; client is bottom and top. It changes no number.
        compile_client: The mode of torch.compile for bottom and top. If it fails, the part logs
            that once and trains without it.
        compile_trunk: The mode of torch.compile for the trunk.
        clients_per_pass (clients): The most clients whose calls, if they have one shape, the
            trunk runs through its blocks at once.
        max_queue_delay_s (seconds): The longest wait of a call for those of other clients.
    """

    rounds: Annotated[int, AtLeast(1)] = 16
    local_steps: Annotated[int, AtLeast(1)] = 15
    # A number that is almost infinite gives no number of steps.
    local_epochs: Annotated[float, AtLeast(0, most=1_000_000)] = 0.0
    max_steps: Annotated[int, AtLeast(0)] = 0
    batch_size: Annotated[int, AtLeast(1)] = 8
    accumulation: Annotated[int, AtLeast(1)] = 1
    micro_batches: Annotated[int, AtLeast(1)] = 1
    optimizer: Annotated[str, OneOf("adamw", "adam", "sgd", *EIGHT_BIT)] = "adamw"
    lr: Annotated[float, Positive()] = 3e-3
    beta1: Annotated[float, Within(0.0, 1.0)] = 0.9
    beta2: Annotated[float, Within(0.0, 1.0)] = 0.95
    eps: Annotated[float, Positive()] = 1e-8
    momentum: Annotated[float, Within(0.0, 1.0)] = 0.0
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    label_smoothing: Annotated[float, Within(0.0, 1.0)] = 0.0
    clip_norm: Annotated[float, AtLeast(0)] = 1.0
    clip: Annotated[str, OneOf("global", "parts")] = "global"
    schedule: Annotated[str, OneOf("constant", "linear", "cosine")] = "cosine"
    warmup_steps: Annotated[int, AtLeast(0)] = 40
    mode: Annotated[str, OneOf("joint", "frozen_trunk", "isolated")] = "joint"
    trunk_steps: Annotated[int, AtLeast(1)] = 1
    evaluate_every: Annotated[int, AtLeast(1)] = 1
    patience: Annotated[int, AtLeast(0)] = 0
    load_best: bool = False
    save_every: Annotated[int, AtLeast(0)] = 1
    checkpointing: Annotated[str, OneOf("none", "trunk", "client", "all")] = "none"
    compile_client: Annotated[str, _COMPILE] = "off"
    compile_trunk: Annotated[str, _COMPILE] = "off"
    clients_per_pass: Annotated[int, AtLeast(1)] = 1
    max_queue_delay_s: Annotated[float, DURATION] = 0.2

    def __post_init__(self) -> None:
        check_fields(self, "train")
        # lr_at needs the total number of steps, except for a constant rate.
        if self.local_epochs and not self.max_steps and self.schedule != "constant":
            raise ConfigError(
                f"train.schedule={self.schedule} needs a number of steps to end at, and with "
                "train.local_epochs it depends on the data; set train.max_steps, or "
                "train.schedule=constant"
            )
        if self.trunk_steps > 1 and self.mode != "joint":
            raise ConfigError(
                f"train.trunk_steps={self.trunk_steps} trains the trunk, but in "
                f"train.mode={self.mode} it stays as it is; use mode=joint or trunk_steps=1"
            )
        if self.clients_per_pass > 1 and self.compile_trunk != "off":
            raise self._cannot_share(f"compile_trunk={self.compile_trunk}")
        if self.clients_per_pass > 1 and self.checkpointing in ("trunk", "all"):
            raise self._cannot_share(f"checkpointing={self.checkpointing}")

    def _cannot_share(self, what: str) -> ConfigError:
        return ConfigError(
            f"train.clients_per_pass={self.clients_per_pass} needs every client's own gradients "
            f"of a pass, which train.{what} does not leave; use one of the two"
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one client over the whole run; the schedule ends there."""
        return self.max_steps or self.rounds * self.local_steps

    def steps_in_round(self, num_sequences: int, taken: int) -> int:
        """Return the number of optimizer steps that a client takes in its next round.

        Args:
            num_sequences: Size of the client's training data.
            taken: Optimizer steps that it has taken before.
        """
        steps = self.local_steps
        if self.local_epochs:
            per_step = self.batch_size * self.accumulation
            # A client takes part in every round, however little data it has.
            steps = max(1, math.ceil(self.local_epochs * num_sequences / per_step))
        return min(steps, self.max_steps - taken) if self.max_steps else steps

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (the first is 0), for all parts.

        It is a linear warm-up over `warmup_steps`, then constant, or a decay to 0 at
        `total_steps`, linear or along half a cosine (Loshchilov and Hutter 2017, without
        restarts).
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        # The warm-up may be longer than the run, and the schedule stays at its end after it.
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.lr * (
            1.0 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        )
