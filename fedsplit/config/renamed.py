"""Renamed and removed fields of a run.

An old name is accepted for one release, with a warning that has the new name.
"""

import logging
from typing import Any

from fedsplit.errors import ConfigError

log = logging.getLogger(__name__)

RENAMED = {
    "wire.halves": "wire.client_weights",
    "train.pass_wait_s": "train.max_queue_delay_s",
    "generation.gather_s": "generation.max_queue_delay_s",
}
"""The new names of fields by their old names."""

RENAMED_GROUPS = {"halves": "client_weights"}
"""The new names of groups by their old names."""

_REMOVED = {"wire.feedback": (False, "error feedback was removed: it saved no bytes")}
"""Removed fields: the one value that is accepted and has no effect, and the reason."""


def current_name(field: str) -> str:
    """Return the present name of a field or a group; log a warning if `field` is an old name."""
    group, dot, rest = field.partition(".")
    new = RENAMED.get(field, RENAMED_GROUPS.get(group, group) + dot + rest)
    if new != field:
        log.warning("%s is called %s now; the next release does not know it", field, new)
    return new


def with_current_names(run: dict[str, Any]) -> dict[str, Any]:
    """Return the nested fields of a run under their present names.

    Raises:
        ConfigError: A removed field has a value that had an effect, or a field is set under both
            of its names.
    """
    renamed: dict[str, Any] = {}
    for name, node in run.items():
        new = current_name(name) if isinstance(name, str) else name
        _require_one(name, new, run)
        # Copied, so that the caller's mapping does not change.
        renamed[new] = dict(node) if isinstance(node, dict) else node
    groups = {name: node for name, node in renamed.items() if isinstance(node, dict)}
    for field, (value, reason) in _REMOVED.items():
        group, name = field.split(".")
        # Runs of the last release have the field in their config.yaml.
        if groups.get(group, {}).pop(name, value) != value:
            raise ConfigError(f"{field} is gone ({reason}); remove it")
    for field in RENAMED:
        group, name = field.split(".")
        if name in groups.get(group, {}):
            new = current_name(field).split(".")[1]
            _require_one(name, new, groups[group])
            groups[group][new] = groups[group].pop(name)
    return renamed


def _require_one(old: str, new: str, names: dict[str, Any]) -> None:
    if old != new and new in names:
        raise ConfigError(f"{old} is the old name of {new}, and both are set; remove {old}")
