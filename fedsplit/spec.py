"""The frozen dataclasses that describe a run: the one place with defaults and range checks.

`conf/` names alternatives and `fedsplit.config` composes them, but every default and every
allowed value stands here. A value that is planned and does not work yet is refused by name.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from fedsplit.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _one_of(name: str, value: str, allowed: Collection[str], later: Collection[str] = ()) -> None:
    if value in later:
        raise ConfigError(f"{name}={value} is not available yet; allowed: {', '.join(allowed)}")
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(allowed)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ConfigError(f"{name}={value} is too small; it must be at least {low}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be greater than 0")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ConfigError(f"{name}={value} is out of range; it must be in [{low}, {high})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """How many blocks each part holds; `trunk=0` stands for all the others.

    >>> SplitSpec.parse("1/2/1").cut(4)
    (1, 3)
    >>> SplitSpec.parse("2/*/1").cut(12)
    (2, 11)
    """

    bottom: int = 1
    trunk: int = 0
    top: int = 1

    def __post_init__(self) -> None:
        _at_least("split.bottom", self.bottom, 1)
        _at_least("split.trunk", self.trunk, 0)
        _at_least("split.top", self.top, 1)

    @staticmethod
    def parse(text: str) -> "SplitSpec":
        """Read `bottom/trunk/top`, where the trunk may be `*` (all the other blocks).

        Raises:
            ConfigError: The text is not three numbers.
        """
        found = re.fullmatch(r"(\d+)/(\d+|\*)/(\d+)", text.strip())
        if not found:
            raise ConfigError(
                f"split={text!r} is not of the form bottom/trunk/top, e.g. 1/2/1 or 1/*/1"
            )
        bottom, trunk, top = found.groups()
        if trunk == "0":
            raise ConfigError(f"split={text!r} leaves the trunk no block; it needs at least 1")
        return SplitSpec(bottom=int(bottom), trunk=0 if trunk == "*" else int(trunk), top=int(top))

    def cut(self, num_blocks: int, model: str = "the model") -> tuple[int, int]:
        """First block of the trunk, and first block after it.

        Raises:
            ConfigError: The model does not have as many blocks as the split asks for.
        """
        ends, trunk = self.bottom + self.top, self.trunk
        if ends + max(trunk, 1) > num_blocks:
            raise ConfigError(
                f"split.bottom + split.top = {ends}, but {model} has {num_blocks} blocks of which "
                f"the trunk needs at least {max(trunk, 1)}; lower one of them"
            )
        if trunk and ends + trunk != num_blocks:
            raise ConfigError(
                f"split {self} covers {ends + trunk} blocks, but {model} has {num_blocks}; make "
                f"them equal, or write {self.bottom}/*/{self.top} to give the trunk all the others"
            )
        return self.bottom, num_blocks - self.top

    def __str__(self) -> str:
        return f"{self.bottom}/{self.trunk or '*'}/{self.top}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A checkpoint to start from, or a family and the settings of a model to make.

    `pretrained` is a hub id or a local directory and wins over `family`; `config` holds fields
    of the family's own Hugging Face config.
    """

    pretrained: str = ""
    revision: str = "main"
    family: str = "gpt2"
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("model.attention", self.attention, ("eager", "sdpa"), later=("flash_attention_2",))
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"), later=("float16",))
        if not self.pretrained and not self.family:
            raise ConfigError("model.pretrained and model.family are both empty; set one of them")

    def __str__(self) -> str:
        return self.pretrained or f"{self.family} from scratch"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Adapters instead of full training; `targets` is peft's own default, or names with commas."""

    enabled: bool = False
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: str = "auto"
    bottom: bool = True
    trunk: bool = True
    top: bool = True

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _at_least("lora.alpha", self.alpha, 1)
        _within("lora.dropout", self.dropout, 0.0, 1.0)
        if self.enabled and not (self.bottom or self.trunk or self.top):
            raise ConfigError(
                "lora.bottom, lora.trunk and lora.top are all false: nothing would train"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where text comes from and how it becomes sequences.

    `path` is a file or directory (text, jsonl) or a hub name (hub); `field` the text's field.
    `sequence_length` and `vocabulary` are in tokens; the vocabulary is that of the tokenizer
    trained for a model made from scratch. `held_out` is the share of documents never trained on.
    """

    kind: str = "embedded"
    path: str = ""
    field: str = "text"
    split: str = "train"
    sequence_length: int = 128
    vocabulary: int = 1024
    held_out: float = 0.1

    def __post_init__(self) -> None:
        _one_of("data", self.kind, ("embedded", "text", "jsonl", "hub"))
        if self.kind != "embedded" and not self.path:
            raise ConfigError(
                f"data.path is empty, but data={self.kind} needs one; set data.path=..."
            )
        _at_least("data.sequence_length", self.sequence_length, 2)
        _at_least("data.vocabulary", self.vocabulary, 257)
        _within("data.held_out", self.held_out, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSpec:
    """How documents are dealt out to clients."""

    kind: str = "natural"

    def __post_init__(self) -> None:
        _one_of("sharding", self.kind, ("iid", "natural"), ("dirichlet", "pathological", "shards"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """What every optimizer of the run, at the clients and at the trunk, does.

    `batch_size` is in sequences and `accumulation` in batches per optimizer step. `clip_norm` is
    the largest global norm over all three parts; 0 turns clipping off. `local_steps` are
    optimizer steps per client and round. `momentum` is SGD's.
    """

    rounds: int = 16
    local_steps: int = 15
    batch_size: int = 8
    accumulation: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 40
    mode: str = "joint"

    def __post_init__(self) -> None:
        for name in ("rounds", "local_steps", "batch_size", "accumulation"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _one_of("train.optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        _one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        _one_of("train.mode", self.mode, ("joint",), ("frozen_trunk", "isolated"))
        _positive("train.lr", self.lr)
        _positive("train.eps", self.eps)
        for name in ("beta1", "beta2", "momentum"):
            _within(f"train.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("weight_decay", "clip_norm", "warmup_steps"):
            _at_least(f"train.{name}", getattr(self, name), 0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one client over the whole run."""
        return self.rounds * self.local_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (the first is 0), the same at every part.

        Linear warm-up over `warmup_steps`, then constant, or down to 0 at `total_steps`,
        linearly or along half a cosine (Loshchilov and Hutter 2017, without restarts).
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.lr * (
            1.0 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """When the trunk steps. `deadline_s` bounds how long one client can hold up the others."""

    kind: str = "sync"
    deadline_s: float = 30.0

    def __post_init__(self) -> None:
        _one_of("policy", self.kind, ("sync",), ("async", "quorum"))
        _positive("policy.deadline_s", self.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSpec:
    """The stream between client and trunk. Times are in seconds, sizes in bytes.

    `bind` is where the trunk server listens (port 0 picks a free one) and `advertise` the
    address clients are told, if it is another. TLS needs `tls_cert` and `tls_key` at the server;
    clients trust `tls_ca`. `call_deadline_s` bounds one call, `budget_s` one call with retries.
    """

    bind: str = "127.0.0.1:0"
    advertise: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    insecure: bool = False
    codec: str = "none"
    call_deadline_s: float = 120.0
    budget_s: float = 300.0
    stash_ttl_s: float = 300.0
    stash_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        _one_of("wire.codec", self.codec, ("none",), ("bf16", "fp16", "int8", "int4", "topk"))
        for name in ("call_deadline_s", "budget_s", "stash_ttl_s", "stash_bytes"):
            _positive(f"wire.{name}", getattr(self, name))
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("wire.tls_cert and wire.tls_key go together; set both or neither")
        if not (self.is_local or self.tls_cert or self.insecure):
            raise ConfigError(
                f"wire.bind={self.bind} can be reached from other machines without encryption; "
                "set wire.tls_cert and wire.tls_key, or wire.insecure=true if you mean it"
            )
        if not self.advertise and self.bind.startswith(("0.0.0.0:", "[::]:")):
            raise ConfigError(
                f"wire.bind={self.bind} is every address of this machine and none that a client "
                "can call; set wire.advertise=host:port"
            )

    @property
    def is_local(self) -> bool:
        """Whether the trunk server can be reached from this machine only."""
        host = self.bind.rpartition(":")[0]
        return self.bind.startswith("unix:") or host in ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec:
    """The Flower strategy of the run, by import path, and the one it wraps for the halves."""

    target: str = "strategies.SplitFedV2"
    halves: str = "flwr.serverapp.strategy.FedAvg"
    halves_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """Where the run takes place; changes no number of it.

    `workers` is how many simulated clients work at once (0: all of them), and `run_dir` the
    folder that holds one folder per run. `start_timeout_s` bounds the wait for the first sign.
    """

    kind: str = "inline"
    workers: int = 0
    run_dir: str = "runs"
    start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _one_of("launch", self.kind, ("inline", "flwr"))
        _at_least("launch.workers", self.workers, 0)
        _positive("launch.start_timeout_s", self.start_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run, whole. Everything but `name` and `launch` decides its numbers.

    >>> RunSpec(seed=1).fingerprint == RunSpec(seed=1, name="again").fingerprint
    True
    """

    name: str = "default"
    seed: int = 0
    clients: int = 4
    model: ModelSpec = field(default_factory=ModelSpec)
    split: SplitSpec = field(default_factory=SplitSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    data: DataSpec = field(default_factory=DataSpec)
    sharding: ShardingSpec = field(default_factory=ShardingSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    policy: PolicySpec = field(default_factory=PolicySpec)
    wire: WireSpec = field(default_factory=WireSpec)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    launch: LaunchSpec = field(default_factory=LaunchSpec)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"name={self.name!r} must be 1 to 64 of the characters A-Z a-z 0-9 _ -"
            )
        _at_least("seed", self.seed, 0)
        _at_least("clients", self.clients, 1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal for two runs that must give the same numbers."""
        told = {k: v for k, v in asdict(self).items() if k not in ("name", "launch")}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
