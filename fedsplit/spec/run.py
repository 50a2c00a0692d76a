"""The settings of a whole run: those of its parts, the launch, and sweeps."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Annotated, Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import (
    DURATION,
    AtLeast,
    Matching,
    OneOf,
    check_fields,
)
from fedsplit.spec.data import TASKS, DataSpec, ShardingSpec
from fedsplit.spec.federation import ClientWeightsSpec, PolicySpec, StrategySpec
from fedsplit.spec.generation import GenerationSpec
from fedsplit.spec.guard import GuardSpec
from fedsplit.spec.limits import LimitsSpec
from fedsplit.spec.model import LoraSpec, ModelSpec, SplitSpec
from fedsplit.spec.privacy import PrivacySpec
from fedsplit.spec.train import TrainSpec
from fedsplit.spec.wire import WireSpec

# All other fields of WireSpec decide numbers. A new field does too, unless it is added here.
_CHANGES_NO_NUMBER = (
    *("bind", "advertise", "tls_cert", "tls_key", "tls_ca", "insecure"),
    *("call_deadline_s", "budget_s", "stash_ttl_s", "stash_bytes"),
)
# Names of runs and variants become names of folders.
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CLIENT = re.compile(r"client-(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """The processes and devices of a run; they change no number of it.

    Attributes:
        kind: Where the run takes place: in this process (inline), or on a SuperLink (flwr).
        workers (clients): The simulated clients that work at once (0: all of them).
        run_dir: The folder that has one folder per run.
        start_timeout_s (seconds): The longest wait for the first node.
        restarts (times): How often launch=flwr starts the run again, in a row without another
            finished round, when a process of it is gone (0: never).
        trunk_device: The torch device of the server's trunk: one, several with commas, or auto
            for all GPUs.
        client_device: The torch device of clients whose node config names none.
        step_metrics: Whether metrics.jsonl has a line for each step of the trunk as well.
        sinks: The import paths of further sinks of the run's events, with commas between them.
    """

    kind: Annotated[str, OneOf("inline", "flwr")] = "inline"
    workers: Annotated[int, AtLeast(0)] = 0
    run_dir: str = "runs"
    start_timeout_s: Annotated[float, DURATION] = 120.0
    restarts: Annotated[int, AtLeast(0)] = 5
    trunk_device: str = "cpu"
    client_device: str = "cpu"
    step_metrics: bool = False
    sinks: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "launch")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """An experiment of several runs: each variant with each seed, on top of the run's settings.

    Attributes:
        kind: The table of the results. Kinds other than compare add figures of their own, and
            memory trains nothing.
        at_once (runs): The runs that work at a time (0: one for each core).
        variants: Overrides by name, as on the command line: {slow: "policy=sync seed=3"}.
        seeds: The seeds of each variant.
    """

    kind: Annotated[str, OneOf("compare", "convergence", "straggler", "noniid", "memory")] = (
        "compare"
    )
    at_once: Annotated[int, AtLeast(0)] = 0
    variants: dict[str, str] = field(default_factory=dict, hash=False)
    seeds: list[int] = field(default_factory=list, hash=False)

    def __post_init__(self) -> None:
        check_fields(self, "sweep")
        for name in self.variants:
            if not NAME_PATTERN.fullmatch(name):
                raise ConfigError(f"sweep.variants: {name!r} must be of A-Z a-z 0-9 _ - only")
        if bool(self.variants) != bool(self.seeds):
            raise ConfigError("sweep.variants and sweep.seeds go together; set both or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conflict:
    """Two settings of a run by their dotted names, the test that finds a conflict, and its error.

    `why` is a format string; `setting` and `run` are its fields.
    """

    setting: str
    other: str
    when: Callable[[Any, Any], object]
    why: str

    def check(self, run: "RunSpec") -> None:
        """Raise ConfigError if the two settings conflict in this run."""
        if self.when(*attrgetter(self.setting, self.other)(run)):
            raise ConfigError(self.why.format(setting=self.setting, run=run))


_NO_TRUNK = (
    "baseline={run.baseline} has no trunk: it takes neither policy.sim_slowdown nor "
    "train.mode={run.train.mode}"
)
_NO_STEPS = (
    "{setting} goes by the trunk's steps, and in train.mode={run.train.mode} it takes none; use "
    "train.mode=joint"
)
_OWN_TIME = (
    "train.clients_per_pass={run.train.clients_per_pass} has clients wait for one another, but "
    "with policy=async or policy.sim_slowdown each goes by its own time; use one of the two"
)

_OF_SEALED: dict[str, tuple[Any, ...]] = {
    "policy.kind": ("sync",),
    "client_weights.strategy": ("flwr.serverapp.strategy.FedAvg",),
    "client_weights.personal": ("none", "bottom", "top"),
    "wire.client_weights": ("none",),
    "train.local_epochs": (0,),
    "baseline": ("none",),
}
"""The values of other settings that sealed client weights go with."""

_OF_WRAPPED: dict[str, tuple[Any, ...]] = {
    "policy.kind": ("sync",),
    "policy.missing": ("wait",),
    "client_weights.sealed": (False,),
    "client_weights.personal": ("none", "bottom", "top"),
    "baseline": ("none", "fedavg", "no_trunk"),
}
"""Those that a wrapper of the strategy for the client weights goes with."""


def _only_with(setting: str, why: str, other: str, allowed: tuple[Any, ...]) -> _Conflict:
    """Return the conflict of a setting that is on with any other value of another one."""

    def is_conflict(is_on: object, value: Any) -> bool:
        return bool(is_on) and value not in allowed

    return _Conflict(
        setting=setting,
        other=other,
        when=is_conflict,
        why=f"{setting} {why}, and does not go with {other}={{run.{other}}}; set "
        f"{other}={allowed[0]}",
    )


# The order decides which error is reported for a run with several conflicts.
_CONFLICTS = (
    _Conflict(
        setting="task",
        other="data.kind",
        when=lambda task, data: (task == "image_classification") != (data == "digits"),
        why="task={run.task} does not go with data={run.data.kind}; images are data=digits with "
        "task=image_classification",
    ),
    _Conflict(
        setting="baseline",
        other="policy.sim_slowdown",
        when=lambda baseline, slowdown: baseline != "none" and slowdown,
        why=_NO_TRUNK,
    ),
    _Conflict(
        setting="baseline",
        other="train.mode",
        when=lambda baseline, mode: baseline != "none" and mode != "joint",
        why=_NO_TRUNK,
    ),
    _Conflict(
        setting="privacy.kind",
        other="baseline",
        when=lambda privacy, baseline: privacy != "off" and baseline != "none",
        why="privacy={run.privacy.kind} is noise at the cut, and baseline={run.baseline} has none; "
        "set privacy=off",
    ),
    _Conflict(
        setting="privacy.kind",
        other="task",
        when=lambda privacy, task: privacy != "off" and task == "image_classification",
        why="privacy={run.privacy.kind} is for text, and its statistics are those of tokens; set "
        "privacy=off for task={run.task}",
    ),
    _Conflict(
        setting="privacy.audit",
        other="client_weights_codec",
        when=lambda audit, codec: audit == "end" and codec == "sealed",
        why="privacy.audit=end reads the joined model, and with client_weights.sealed a server has "
        "none; join it at a client, and audit that: fedsplit audit DIR --split ...",
    ),
    _Conflict(
        setting="privacy.audit",
        other="task",
        when=lambda audit, task: audit == "end" and task != "causal_lm",
        why="privacy.audit=end reads language models, and task={run.task} makes none",
    ),
    _Conflict(
        setting="privacy.audit",
        other="baseline",
        when=lambda audit, baseline: audit == "end" and baseline != "none",
        why="privacy.audit=end reads what passes the cut, and baseline={run.baseline} has none",
    ),
    _Conflict(
        setting="privacy.kind",
        other="train.mode",
        when=lambda privacy, mode: privacy == "strict" and mode != "isolated",
        why="with privacy=strict no gradient leaves a client, so the trunk stays as it is, but "
        "train.mode={run.train.mode} sends gradients, which determine the labels; set "
        "train.mode=isolated, or privacy=noise",
    ),
    _Conflict(
        setting="privacy.kind",
        other="client_weights_codec",
        when=lambda privacy, codec: privacy == "strict" and codec not in ("sealed", "nothing"),
        why="with privacy=strict the server gets no client weights that it can read, from which "
        "it would learn the words and the map to the cut; set client_weights=sealed or "
        "client_weights=personal, or privacy=noise",
    ),
    *(
        _only_with("client_weights.sealed", "is FedAvg of the clients of a round", *each)
        for each in _OF_SEALED.items()
    ),
    *(
        _only_with("client_weights.wrap", "has noise for all clients of a round", *each)
        for each in _OF_WRAPPED.items()
    ),
    _Conflict(
        setting="wire.client_weights",
        other="shares_client_weights",
        when=lambda codec, shares: codec != "none" and not shares,
        why="wire.client_weights={run.wire.client_weights} has nothing to compress: no client "
        "sends client weights; set wire.client_weights=none",
    ),
    _Conflict(
        setting="wire.history_bytes",
        other="train.mode",
        when=lambda history_bytes, mode: history_bytes and mode != "joint",
        why=_NO_STEPS,
    ),
    _Conflict(
        setting="policy.sim_slowdown",
        other="train.mode",
        when=lambda slowdown, mode: slowdown and mode != "joint",
        why=_NO_STEPS,
    ),
    _Conflict(
        setting="policy.missing",
        other="train.save_every",
        when=lambda missing, save_every: missing == "wait" and not save_every,
        why="policy.missing=wait repeats a round from the last checkpoint, and with "
        "train.save_every=0 there is none; set train.save_every=1, or policy.missing=drop",
    ),
    _Conflict(
        setting="train.clients_per_pass",
        other="policy.kind",
        when=lambda clients, policy: clients > 1 and policy == "async",
        why=_OWN_TIME,
    ),
    _Conflict(
        setting="train.clients_per_pass",
        other="policy.sim_slowdown",
        when=lambda clients, slowdown: clients > 1 and slowdown,
        why=_OWN_TIME,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All settings of one run; each group of them has a class of its own.

    All of them decide its numbers, except `name`, `launch`, `resume`, `sweep`, `generation`,
    `limits`, `guard`, `train.save_every`, `policy.missing`, `privacy.budget_bits`,
    `privacy.audit`, and the addresses, TLS files, times and stash of `wire`.

    >>> RunSpec(seed=1).fingerprint == RunSpec(seed=1, name="again").fingerprint
    True

    Attributes:
        name: The name of the run and of its folder.
        seed: The seed of all random numbers of the run.
        clients (clients): The number of clients.
        task: The task of the model's head.
        baseline: A method to compare split learning with, in place of it: the unsplit model on
            all data (central), FedAvg of whole models (fedavg), each client alone (local), or
            FedAvg of the clients' own blocks without any trunk (no_trunk).
        resume: The folder of a run to continue; auto continues the latest interrupted run of this
            name, if there is one, and does not train again what is finished with these settings.
    """

    name: Annotated[str, Matching(NAME_PATTERN, "1 to 64 of the characters A-Z a-z 0-9 _ -")] = (
        "default"
    )
    # NumPy's generators refuse negative seeds, and torch's those of more than 64 bits.
    seed: Annotated[int, AtLeast(0, most=(1 << 64) - 1)] = 0
    clients: Annotated[int, AtLeast(1)] = 4
    task: Annotated[str, OneOf(*TASKS)] = "causal_lm"
    baseline: Annotated[str, OneOf("none", "central", "fedavg", "local", "no_trunk")] = "none"
    resume: str = ""
    model: ModelSpec = field(default_factory=ModelSpec)
    split: SplitSpec = field(default_factory=SplitSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    data: DataSpec = field(default_factory=DataSpec)
    sharding: ShardingSpec = field(default_factory=ShardingSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    policy: PolicySpec = field(default_factory=PolicySpec)
    client_weights: ClientWeightsSpec = field(default_factory=ClientWeightsSpec)
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    wire: WireSpec = field(default_factory=WireSpec)
    generation: GenerationSpec = field(default_factory=GenerationSpec)
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    guard: GuardSpec = field(default_factory=GuardSpec)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    launch: LaunchSpec = field(default_factory=LaunchSpec)
    sweep: SweepSpec = field(default_factory=SweepSpec)

    def __post_init__(self) -> None:
        check_fields(self)
        for conflict in _CONFLICTS:
            conflict.check(self)
        # The virtual clock stops at the next event of a client that waits for a free worker.
        if self.policy.sim_slowdown and 0 < self.launch.workers < self.clients:
            raise ConfigError(
                f"policy.sim_slowdown needs all {self.clients} clients at work at once, but "
                f"launch.workers={self.launch.workers}; set launch.workers=0"
            )
        for name in sorted(self.policy.sim_slowdown):
            found = _CLIENT.fullmatch(name)
            if not found or int(found[1]) >= self.clients:
                raise ConfigError(
                    f"policy.sim_slowdown names {name}, but the clients of this run are client-0 "
                    f"to client-{self.clients - 1}"
                )

    @property
    def num_nodes(self) -> int:
        """Number of Flower nodes: one per client, or one with all data for `central`."""
        return 1 if self.baseline == "central" else self.clients

    @property
    def shares_client_weights(self) -> bool:
        """Whether clients send any of their weights to the server."""
        return self.baseline != "local" and self.client_weights.personal != "both"

    @property
    def client_weights_codec(self) -> str:
        """How messages carry client weights: sealed, nothing, or as `wire.client_weights` says."""
        if not self.shares_client_weights:
            return "nothing"
        return "sealed" if self.client_weights.sealed else self.wire.client_weights

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that decide the run's numbers, by dotted name."""
        left_out = ("name", "launch", "resume", "sweep", "generation", "limits", "guard")
        nested = {name: value for name, value in asdict(self).items() if name not in left_out}
        wire = nested["wire"].items()
        nested["wire"] = {name: value for name, value in wire if name not in _CHANGES_NO_NUMBER}
        # A bound changes no number until it ends the run, and without noise nothing of it does.
        del nested["privacy"]["budget_bits"], nested["privacy"]["audit"]
        if self.privacy.kind == "off":
            del nested["privacy"]
        if not self.client_weights.wrap:
            del nested["client_weights"]["wrap"], nested["client_weights"]["wrap_options"]
        # What a run does about a crash does not change what it computes.
        del nested["train"]["save_every"], nested["policy"]["missing"]
        return dict(_flat(nested, ""))

    @property
    def texts(self) -> dict[str, str]:
        """The `settings` as JSON, by dotted name."""
        return {name: json.dumps(value) for name, value in self.settings.items()}

    @property
    def fingerprint(self) -> str:
        """16 hex digits; two runs with the same fingerprint must give the same numbers."""
        # Sorted keys and fixed separators: the text must not depend on the order of fields.
        text = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
