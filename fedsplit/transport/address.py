"""The check of an address before gRPC gets it."""

import re

from fedsplit.errors import ConfigError

_LAST_PORT = 65535


def check_port(what: str, address: str) -> None:
    """Refuse a port that does not exist; gRPC would take another one in its place.

    Args:
        what: The setting or the thing that has the address, for the error.
        address: host:port or unix:path; an address of another form is left to gRPC.

    Raises:
        ConfigError: The port is not from 0 to 65535.
    """
    port = "" if address.startswith("unix:") else address.rpartition(":")[2]
    exists = re.fullmatch(r"0*\d{1,5}", port) and int(port[-5:]) <= _LAST_PORT
    if re.fullmatch(r"-?\d+", port) and not exists:
        raise ConfigError(
            f"{what}{address} has a port that does not exist; give one from 0 to {_LAST_PORT}"
        )
