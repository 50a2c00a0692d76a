"""The table of fields that are set by a run, by a client's machine, or by the server's machine."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec


class Authority(StrEnum):
    """The setter of a field at a SuperNode.

    A `RUN` field names nothing on a machine. A `NODE` field is set by the node's config, and the
    run's value has no effect there. For `BOTH`, the run chooses within the bounds that the node
    sets. A `SERVER` field is not read by clients.
    """

    RUN = "run"
    NODE = "node"
    BOTH = "both"
    SERVER = "server"


NODE_KEYS = {
    "wire.tls_ca": "tls-ca",
    "launch.client_device": "device",
    "launch.run_dir": "state-dir",
    "launch.metrics": "metrics",
    "launch.traces": "traces",
}
"""The keys of a node's config in place of the fields that the node sets."""

PRIVACY_KEYS = {
    "kind": "privacy",
    "z": "privacy-z",
    "gradient_z": "privacy-gradient-z",
    "public": "public-text",
    "budget_bits": "privacy-budget-bits",
}
"""The keys of a node's config that replace fields of the run's `privacy`."""

NODE_CONFIG = (
    "partition-id",
    "num-partitions",
    "data-path",
    "trunk-address",
    "allowed-path",
    "targets",
    "seal-key",
    "trust-runs",
    *NODE_KEYS.values(),
    *PRIVACY_KEYS.values(),
)
"""All keys of a node's config."""

_BY_NAME = {
    **dict.fromkeys(NODE_KEYS, Authority.NODE),
    "resume": Authority.SERVER,
    "model.pretrained": Authority.BOTH,
    "model.family": Authority.RUN,
    "model.config": Authority.RUN,
    "lora.targets": Authority.RUN,
    "data.path": Authority.BOTH,
    "data.field": Authority.RUN,
    "data.label": Authority.RUN,
    "data.split": Authority.RUN,
    "sharding.target": Authority.BOTH,
    "sharding.options": Authority.RUN,
    "client_weights.strategy": Authority.SERVER,
    "client_weights.options": Authority.SERVER,
    "client_weights.wrap": Authority.SERVER,
    "client_weights.wrap_options": Authority.SERVER,
    "wire.bind": Authority.SERVER,
    "wire.advertise": Authority.SERVER,
    "wire.tls_cert": Authority.SERVER,
    "wire.tls_key": Authority.SERVER,
    "strategy.target": Authority.BOTH,
    "privacy.public": Authority.BOTH,
    "launch.trunk_device": Authority.SERVER,
    "launch.sinks": Authority.SERVER,
    "sweep.variants": Authority.SERVER,
}

_PACKAGES = ("fedsplit", "strategies", "flwr", "flwr_datasets")
"""The packages of which a run may name classes: this one, and those of Flower."""

_FILES = ("text", "jsonl", "parquet", "csv", "saved")
"""The kinds of data that are read from `data.path`."""

_MODEL = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Names without an owner include the readers of `datasets` for local files, such as `text`.
_DATA_SET = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def authority_of(field: str) -> Authority:
    """Return the setter of a field.

    All fields of text that may be any text, and of mappings with any values, are listed. The
    others are numbers, switches and words of a list, which a run sets.

    >>> str(authority_of("train.lr")), str(authority_of("launch.run_dir"))
    ('run', 'node')

    Args:
        field: Its dotted name.
    """
    return _BY_NAME.get(field, Authority.RUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The things on a client's machine that a run may name.

    Attributes:
        path: The folder of the models and data that a run may name; empty for none.
        targets: Import paths that a run may name, besides those of fedsplit and Flower.
        reads_corpus: Whether the client reads `data.path`, and not data of its own.
    """

    path: str
    targets: tuple[str, ...]
    reads_corpus: bool

    def check(self, run: RunSpec) -> None:
        """Refuse a run that names something else; nothing is opened or imported.

        Raises:
            ConfigError: The text has the field and its value, and nothing of the machine.
        """
        self._check_target("strategy.target", run.strategy.target)
        if run.privacy.public:
            self._check_path("privacy.public", run.privacy.public)
        if run.model.pretrained:
            self._check_name("model.pretrained", run.model.pretrained, _MODEL)
        if not self.reads_corpus:
            return
        if run.sharding.target:
            self._check_target("sharding.target", run.sharding.target)
        if run.data.kind == "hub":
            # A configuration may follow the name.
            self._check_name("data.path", run.data.path.partition(":")[0], _DATA_SET)
        elif run.data.kind in _FILES:
            self._check_path("data.path", run.data.path)

    def _check_name(self, field: str, name: str, hub_id: re.Pattern[str]) -> None:
        # A name that exists here would be read from this machine, and not from the hub.
        if not hub_id.fullmatch(name) or Path(name).exists():
            self._check_path(field, name, "neither OWNER/NAME of the hub nor ")

    def _check_path(self, field: str, path: str, neither: str = "not ") -> None:
        if not (self.path and _lies_in(path, self.path)):
            raise ConfigError(
                f"{field}={path} is {neither}a path that this client's machine lets runs read; "
                "start its SuperNode with allowed-path in --node-config, a folder that has it"
            )

    def _check_target(self, field: str, target: str) -> None:
        package = re.split("[.:]", target, maxsplit=1)[0]
        if package not in _PACKAGES and target not in self.targets:
            raise ConfigError(
                f"{field}={target} is not of {_listed(_PACKAGES)}; a SuperNode imports it if its "
                f'--node-config has targets="{target}"'
            )


def _lies_in(path: str, folder: str) -> bool:
    try:
        found = Path(path).expanduser().resolve()
    # A home that does not exist, a loop of links, or a null character.
    except (RuntimeError, OSError, ValueError):
        return False
    return found.is_relative_to(Path(folder).expanduser().resolve())


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
