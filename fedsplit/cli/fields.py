"""The fields of a run that `fedsplit serve` uses, as lines of its help."""

from collections.abc import Iterator
from operator import attrgetter

from fedsplit.spec import RunSpec
from fedsplit.spec.fields import described

_GROUPS = ("generation", "limits", "train", "policy", "strategy", "wire")
# Options set these, or only clients use them.
_LEFT_OUT = ("bind", "advertise", "tls_cert", "tls_key", "tls_ca", "insecure", "client_weights")


def served_fields() -> Iterator[str]:
    """Yield a line for each group and each of its fields, with the default value."""
    defaults = RunSpec()
    yield "fields and their default values; clients that train need equal ones:"
    for group in described():
        if group.name not in _GROUPS:
            continue
        yield f"{group.name}: {group.phrase}"
        for field in group.fields:
            if field.name.rpartition(".")[2] not in _LEFT_OUT:
                value = attrgetter(field.name)(defaults)
                yield f"{field.name}={value}: {field.phrase} ({field.values})"
