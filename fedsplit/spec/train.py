"""The settings of training: optimizers, their schedule, rounds, and early stopping."""

import math
from dataclasses import dataclass

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import at_least, one_of, positive, within

EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
"""Optimizers that need bitsandbytes."""

_MODES = ("off", "default", "max-autotune-no-cudagraphs")
# A CUDA graph overwrites its last output, but several outputs wait for their backward here.
_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """The training settings of a run; clients and trunk use the same ones.

    `batch_size` is in sequences and `accumulation` in batches per optimizer step. Each batch is
    cut into `micro_batches` pieces, and the three parts process different pieces at the same
    time; the step is the same, up to the rounding of sums. A client takes `local_steps` optimizer
    steps per round, or `local_epochs` epochs over its data if that is above 0. Over the whole run
    it takes at most `max_steps` steps (0: no limit), which then is also the length of the
    schedule.

    `clip_norm` is the largest norm of the gradient, over all three parts (`clip=global`) or over
    the client's parts and the trunk separately (`clip=parts`); 0 turns clipping off. `momentum`
    is for SGD. Weight decay applies to matrices only. `adamw_8bit` stores its moments in 8 bits
    (extra `optimizers`), and `paged_adamw_8bit` stores them in memory that is paged out to the
    CPU when the GPU is short of memory.

    `mode` selects the parts that train: `joint` trains all three; `frozen_trunk` trains bottom
    and top with gradients that pass through a constant trunk; `isolated` trains the top on the
    trunk's outputs and the bottom on an auxiliary head, and no gradient passes through the trunk.
    `trunk_steps` is the number of steps that the trunk takes per step of the clients, from stored
    activations.

    `checkpointing` names the parts that store only the inputs of their blocks for the backward
    and compute the rest again: `none`, `trunk`, `client` (bottom and top) or `all`; it changes no
    number. `compile_client` and `compile_trunk` are modes of `torch.compile`, or `off`; if it
    fails, the part logs that once and trains without it.

    The trunk runs the calls of up to `clients_per_pass` clients, if they have one shape, through
    its blocks at once; a call waits at most `max_queue_delay_s` seconds for others.

    Held-out loss is measured every `evaluate_every` rounds and in the last one. Training stops
    early after `patience` measured rounds without improvement (0: never), `load_best` makes the
    best of them the result, and every `save_every` rounds (0: never) a checkpoint is written that
    `resume` can continue from.
    """

    rounds: int = 16
    local_steps: int = 15
    local_epochs: float = 0.0
    max_steps: int = 0
    batch_size: int = 8
    accumulation: int = 1
    micro_batches: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float = 1.0
    clip: str = "global"
    schedule: str = "cosine"
    warmup_steps: int = 40
    mode: str = "joint"
    trunk_steps: int = 1
    evaluate_every: int = 1
    patience: int = 0
    load_best: bool = False
    save_every: int = 0
    checkpointing: str = "none"
    compile_client: str = "off"
    compile_trunk: str = "off"
    clients_per_pass: int = 1
    max_queue_delay_s: float = 0.2

    def __post_init__(self) -> None:
        counts = ("rounds", "local_steps", "batch_size", "accumulation", "micro_batches")
        for name in (*counts, "trunk_steps", "clients_per_pass"):
            at_least(f"train.{name}", getattr(self, name), 1)
        one_of("train.optimizer", self.optimizer, ("adamw", "adam", "sgd", *EIGHT_BIT))
        one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("train.clip", self.clip, ("global", "parts"))
        one_of("train.mode", self.mode, ("joint", "frozen_trunk", "isolated"))
        one_of("train.checkpointing", self.checkpointing, ("none", "trunk", "client", "all"))
        for name in ("compile_client", "compile_trunk"):
            one_of(f"train.{name}", getattr(self, name), _MODES, later=_WITH_CUDA_GRAPHS)
        positive("train.lr", self.lr)
        positive("train.eps", self.eps)
        positive("train.max_queue_delay_s", self.max_queue_delay_s)
        for name in ("beta1", "beta2", "momentum", "label_smoothing"):
            within(f"train.{name}", getattr(self, name), 0.0, 1.0)
        bounds = ("local_epochs", "max_steps", "warmup_steps", "patience", "save_every")
        for name in ("weight_decay", "clip_norm", *bounds):
            at_least(f"train.{name}", getattr(self, name), 0)
        at_least("train.evaluate_every", self.evaluate_every, 1)
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
