"""Fields that had another name in the last release, and fields that are gone.

An old name is read for one release, with a warning that gives the new one.
"""

import logging
from typing import Any

from fedsplit.errors import ConfigError

log = logging.getLogger(__name__)

RENAMED = {
    "train.pass_wait_s": "train.max_queue_delay_s",
    "generation.gather_s": "generation.max_queue_delay_s",
}
"""New names of fields by their old ones."""

_REMOVED = {"wire.feedback": (False, "error feedback was removed: it saved no bytes")}
"""Fields that are gone: the one value that changes nothing, and why they are gone."""


def current_name(field: str) -> str:
    """The name of a field now; warns about an old one."""
    if field not in RENAMED:
        return field
    log.warning("%s is called %s now; the next release does not know it", field, RENAMED[field])
    return RENAMED[field]


def with_current_names(run: dict[str, Any]) -> dict[str, Any]:
    """The nested fields of a run under the names of now.

    Raises:
        ConfigError: A field that is gone has a value that would have changed the run.
    """
    groups = {name: dict(node) for name, node in run.items() if isinstance(node, dict)}
    for field, (value, reason) in _REMOVED.items():
        group, name = field.split(".")
        if groups.get(group, {}).pop(name, value) != value:
            raise ConfigError(f"{field} is gone ({reason}); remove it")
    for field in RENAMED:
        group, name = field.split(".")
        if name in groups.get(group, {}):
            groups[group][current_name(field).split(".")[1]] = groups[group].pop(name)
    return run | groups
