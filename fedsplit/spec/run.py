"""The settings of a whole run: those of its parts, the launch, and sweeps."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fedsplit.errors import ConfigError
from fedsplit.spec.checks import (
    DURATION,
    AtLeast,
    Matching,
    OneOf,
    Positive,
    check_fields,
)
from fedsplit.spec.conflicts import CONFLICTS
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
_CLUSTER = re.compile(r"|auto|[^\s:/]+:[0-9]{1,5}")
_CLIENT = re.compile(r"client-(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """The processes and devices of a run; they change no number of it.

    Attributes:
        kind: Where the run takes place: in this process (inline), or on a SuperLink (flwr).
        workers (clients): The simulated clients that work at once (0: all of them).
        ray_address: The Ray cluster on which launch=flwr simulates the clients: HOST:PORT of its
            head, or auto for the one of this machine (empty: a new one for this run).
        run_dir: The folder that has one folder per run.
        start_timeout_s (seconds): The longest wait for the first node.
        restarts (times): How often launch=flwr starts the run again, in a row without another
            finished round, when a process of it is gone (0: never).
        trunk_device: The torch device of the server's trunk: one, several with commas, or auto
            for all GPUs.
        trunk_servers (servers): The processes that serve the trunk. Each serves its part of the
            clients, and one of them takes the steps.
        trunk_tp (ranks): The processes that each matrix of the trunk is cut over. More than one are
            on the GPUs of the machine, or on the CPU if it has none.
        client_device: The torch device of clients whose node config names none.
        metrics: The address, host:port, at which Prometheus reads the metrics of the run (empty:
            nowhere).
        traces: The folder in which each process writes the times of steps (empty: none).
        trace_share: The share of the clients' steps that are traced, chosen at random.
        client_labels: Whether the metrics tell the clients of the run apart, by their names.
        step_metrics: Whether metrics.jsonl has a line for each step of the trunk as well.
        sinks: The import paths of further sinks of the run's events, with commas between them.
    """

    kind: Annotated[str, OneOf("inline", "flwr")] = "inline"
    workers: Annotated[int, AtLeast(0)] = 0
    ray_address: Annotated[str, Matching(_CLUSTER, "HOST:PORT, or auto")] = ""
    run_dir: str = "runs"
    start_timeout_s: Annotated[float, DURATION] = 120.0
    restarts: Annotated[int, AtLeast(0)] = 5
    trunk_device: str = "cpu"
    trunk_servers: Annotated[int, AtLeast(1)] = 1
    trunk_tp: Annotated[int, AtLeast(1)] = 1
    client_device: str = "cpu"
    metrics: str = ""
    traces: str = ""
    trace_share: Annotated[float, Positive(most=1)] = 0.01
    client_labels: bool = False
    step_metrics: bool = False
    sinks: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "launch")
        if self.ray_address and (self.kind != "flwr" or self.workers):
            found = f"launch.workers={self.workers}" if self.workers else f"launch={self.kind}"
            raise ConfigError(
                f"launch.ray_address={self.ray_address} is for clients that Flower simulates, all "
                f"at once, and does not go with {found}; set launch=flwr and launch.workers=0, or "
                "leave launch.ray_address out"
            )
        if self.client_labels and not self.metrics:
            raise ConfigError(
                "launch.client_labels=true needs launch.metrics, which is empty; set "
                "launch.metrics=HOST:PORT, or leave launch.client_labels out"
            )


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
        for conflict in CONFLICTS:
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
    def client_names(self) -> tuple[str, ...]:
        """The names of the clients, one for each node."""
        return tuple(f"client-{number}" for number in range(self.num_nodes))

    @property
    def trains_trunk_in_full(self) -> bool:
        """Whether all weights of the trunk train, and not only adapters or nothing."""
        return self.train.mode == "joint" and not self.lora.enabled

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
        for name in ("quantize", "quantize_client"):
            if nested["model"][name] == "off":
                del nested["model"][name]
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
