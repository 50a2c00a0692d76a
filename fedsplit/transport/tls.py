"""The TLS credentials of client and server, read from the files that `WireSpec` names."""

from pathlib import Path

import grpc

from fedsplit.errors import ConfigError
from fedsplit.spec import WireSpec


def server_credentials(wire: WireSpec) -> grpc.ServerCredentials:
    """The server's key and certificate chain.

    Raises:
        ConfigError: A file cannot be read.
    """
    key, chain = _read("tls_key", wire.tls_key), _read("tls_cert", wire.tls_cert)
    return grpc.ssl_server_credentials([(key, chain)])


def channel_credentials(wire: WireSpec, ca: bytes = b"") -> grpc.ChannelCredentials:
    """A client's trust: in `ca` (PEM), else in `wire.tls_ca`, else in the system's authorities.

    Raises:
        ConfigError: The file cannot be read.
    """
    roots = ca or (_read("tls_ca", wire.tls_ca) if wire.tls_ca else None)
    return grpc.ssl_channel_credentials(roots)


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"wire.{name}={path} cannot be read: {exc.strerror}") from exc
