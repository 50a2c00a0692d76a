"""The settings of a run that do not go together, and their errors."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from fedsplit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two settings of a run by their dotted names, the test that finds a conflict, and its error.

    `why` is a format string; `setting` and `run` are its fields.
    """

    setting: str
    other: str
    when: Callable[[Any, Any], object]
    why: str

    def check(self, run: Any) -> None:
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

_SHARED_STEPS = (
    "launch.trunk_servers={run.launch.trunk_servers} shares the steps of one trunk among several "
    "servers, but "
)
_OF_SEVERAL_SERVERS: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "policy.kind": (
        lambda servers, policy: servers > 1 and policy == "async",
        "with policy=async every contribution is a step, after which all servers would need new "
        "parameters; use policy=sync or policy=quorum",
    ),
    "policy.sim_slowdown": (
        lambda servers, slowdown: servers > 1 and slowdown,
        "policy.sim_slowdown has one virtual clock; use launch.trunk_servers=1",
    ),
    "train.mode": (
        lambda servers, mode: servers > 1 and mode != "joint",
        "in train.mode={run.train.mode} the trunk takes none; use train.mode=joint",
    ),
    "baseline": (
        lambda servers, baseline: servers > 1 and baseline != "none",
        "baseline={run.baseline} has no trunk; use launch.trunk_servers=1",
    ),
}
"""When each of these settings does not go with several trunk servers, and why."""

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
_OF_CUT: dict[str, tuple[Any, ...]] = {
    "launch.trunk_device": ("cpu", "auto"),
    "train.optimizer": ("adamw", "adam", "sgd"),
    "train.compile_trunk": ("off",),
    "policy.sim_slowdown": ({},),
    "baseline": ("none",),
}
"""Those that a trunk which is cut over several ranks goes with."""


def _only_with(
    setting: str, why: str, other: str, allowed: tuple[Any, ...], *, off: object
) -> Conflict:
    """Return the conflict of a setting that is not `off` with any other value of another one."""

    def is_conflict(value: object, other_value: Any) -> bool:
        return value != off and other_value not in allowed

    return Conflict(
        setting=setting,
        other=other,
        when=is_conflict,
        why=f"{setting} {why}, and does not go with {other}={{run.{other}}}; set "
        f"{other}={allowed[0]}",
    )


# The order decides which error is reported for a run with several conflicts.
CONFLICTS = (
    Conflict(
        setting="task",
        other="data.kind",
        when=lambda task, data: (task == "image_classification") != (data == "digits"),
        why="task={run.task} does not go with data={run.data.kind}; images are data=digits with "
        "task=image_classification",
    ),
    Conflict(
        setting="baseline",
        other="policy.sim_slowdown",
        when=lambda baseline, slowdown: baseline != "none" and slowdown,
        why=_NO_TRUNK,
    ),
    Conflict(
        setting="baseline",
        other="train.mode",
        when=lambda baseline, mode: baseline != "none" and mode != "joint",
        why=_NO_TRUNK,
    ),
    *(
        Conflict(
            setting=setting,
            other="baseline",
            when=lambda kind, baseline: kind != "off" and baseline != "none",
            why="{setting} is for the parts of a split model, and baseline={run.baseline} trains "
            "the unsplit one; set {setting}=off",
        )
        for setting in ("model.quantize", "model.quantize_client")
    ),
    Conflict(
        setting="model.quantize",
        other="trains_trunk_in_full",
        when=lambda kind, in_full: kind != "off" and in_full,
        why="model.quantize={run.model.quantize} freezes the trunk's layers, and "
        "lora.enabled=false trains them in full; set lora.enabled=true, or train.mode=frozen_trunk",
    ),
    Conflict(
        setting="model.quantize",
        other="client_weights.sealed",
        when=lambda kind, sealed: kind != "off" and sealed,
        why="with client_weights.sealed a run leaves its trunk for the clients to join, and "
        "model.quantize={run.model.quantize} leaves no plain weights; set model.quantize=off",
    ),
    Conflict(
        setting="model.quantize_client",
        other="lora.enabled",
        when=lambda kind, has_adapters: kind != "off" and not has_adapters,
        why="model.quantize_client={run.model.quantize_client} freezes the layers of the client's "
        "blocks, and lora.enabled=false trains them in full; set lora.enabled=true, or "
        "model.quantize_client=off",
    ),
    Conflict(
        setting="privacy.kind",
        other="baseline",
        when=lambda privacy, baseline: privacy != "off" and baseline != "none",
        why="privacy={run.privacy.kind} is noise at the cut, and baseline={run.baseline} has none; "
        "set privacy=off",
    ),
    Conflict(
        setting="privacy.kind",
        other="task",
        when=lambda privacy, task: privacy != "off" and task == "image_classification",
        why="privacy={run.privacy.kind} is for text, and its statistics are those of tokens; set "
        "privacy=off for task={run.task}",
    ),
    Conflict(
        setting="privacy.audit",
        other="client_weights_codec",
        when=lambda audit, codec: audit == "end" and codec == "sealed",
        why="privacy.audit=end reads the joined model, and with client_weights.sealed a server has "
        "none; join it at a client, and audit that: fedsplit audit DIR --split ...",
    ),
    Conflict(
        setting="privacy.audit",
        other="task",
        when=lambda audit, task: audit == "end" and task != "causal_lm",
        why="privacy.audit=end reads language models, and task={run.task} makes none",
    ),
    Conflict(
        setting="privacy.audit",
        other="baseline",
        when=lambda audit, baseline: audit == "end" and baseline != "none",
        why="privacy.audit=end reads what passes the cut, and baseline={run.baseline} has none",
    ),
    Conflict(
        setting="privacy.kind",
        other="train.mode",
        when=lambda privacy, mode: privacy == "strict" and mode != "isolated",
        why="with privacy=strict no gradient leaves a client, so the trunk stays as it is, but "
        "train.mode={run.train.mode} sends gradients, which determine the labels; set "
        "train.mode=isolated, or privacy=noise",
    ),
    Conflict(
        setting="privacy.kind",
        other="client_weights_codec",
        when=lambda privacy, codec: privacy == "strict" and codec not in ("sealed", "nothing"),
        why="with privacy=strict the server gets no client weights that it can read, from which "
        "it would learn the words and the map to the cut; set client_weights=sealed or "
        "client_weights=personal, or privacy=noise",
    ),
    *(
        _only_with("client_weights.sealed", "is FedAvg of the clients of a round", *each, off=False)
        for each in _OF_SEALED.items()
    ),
    *(
        _only_with("client_weights.wrap", "has noise for all clients of a round", *each, off="")
        for each in _OF_WRAPPED.items()
    ),
    *(
        _only_with("launch.trunk_tp", "cuts the trunk over several ranks", *each, off=1)
        for each in _OF_CUT.items()
    ),
    Conflict(
        setting="launch.trunk_tp",
        other="model.quantize",
        when=lambda ranks, kind: ranks > 1 and kind != "off",
        why="launch.trunk_tp={run.launch.trunk_tp} cuts plain weights over several ranks, but "
        "model.quantize={run.model.quantize} packs them; set model.quantize=off, or "
        "launch.trunk_tp=1",
    ),
    Conflict(
        setting="wire.client_weights",
        other="shares_client_weights",
        when=lambda codec, shares: codec != "none" and not shares,
        why="wire.client_weights={run.wire.client_weights} has nothing to compress: no client "
        "sends client weights; set wire.client_weights=none",
    ),
    Conflict(
        setting="wire.history_bytes",
        other="train.mode",
        when=lambda history_bytes, mode: history_bytes and mode != "joint",
        why=_NO_STEPS,
    ),
    Conflict(
        setting="policy.sim_slowdown",
        other="train.mode",
        when=lambda slowdown, mode: slowdown and mode != "joint",
        why=_NO_STEPS,
    ),
    Conflict(
        setting="policy.missing",
        other="train.save_every",
        when=lambda missing, save_every: missing == "wait" and not save_every,
        why="policy.missing=wait repeats a round from the last checkpoint, and with "
        "train.save_every=0 there is none; set train.save_every=1, or policy.missing=drop",
    ),
    *(
        Conflict(setting="launch.trunk_servers", other=other, when=when, why=_SHARED_STEPS + why)
        for other, (when, why) in _OF_SEVERAL_SERVERS.items()
    ),
    Conflict(
        setting="train.clients_per_pass",
        other="policy.kind",
        when=lambda clients, policy: clients > 1 and policy == "async",
        why=_OWN_TIME,
    ),
    Conflict(
        setting="train.clients_per_pass",
        other="policy.sim_slowdown",
        when=lambda clients, slowdown: clients > 1 and slowdown,
        why=_OWN_TIME,
    ),
)
