"""The TLS credentials of client and server, read from the files that `WireSpec` names."""

import ssl
from pathlib import Path

import grpc

from fedsplit.errors import ConfigError
from fedsplit.spec import WireSpec


def server_credentials(wire: WireSpec) -> grpc.ServerCredentials:
    """The server's key and certificate chain.

    Raises:
        ConfigError: A file cannot be read, or the two do not belong together.
    """
    key, chain = _read("tls_key", wire.tls_key), _read("tls_cert", wire.tls_cert)
    # gRPC would report that it cannot listen on the address.
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(wire.tls_cert, wire.tls_key, password="")
    except ssl.SSLError as exc:
        raise ConfigError(
            f"wire.tls_cert={wire.tls_cert} and wire.tls_key={wire.tls_key} are not a certificate "
            f"and its key: {exc}; give PEM files that belong together, the key without a passphrase"
        ) from exc
    return grpc.ssl_server_credentials([(key, chain)])


def channel_credentials(wire: WireSpec, ca: bytes = b"") -> grpc.ChannelCredentials:
    """A client's trust: in `ca` (PEM), else in `wire.tls_ca`, else in the system's authorities.

    Raises:
        ConfigError: The file cannot be read, or has no certificate.
    """
    if ca or not wire.tls_ca:
        return grpc.ssl_channel_credentials(ca or None)
    roots = _read("tls_ca", wire.tls_ca)
    # gRPC would report that no trunk answers, which a client takes for an outage.
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(wire.tls_ca)
    except ssl.SSLError as exc:
        raise ConfigError(
            f"wire.tls_ca={wire.tls_ca} has no certificate that can be read: {exc}; give the PEM "
            "file of the authority that signed the certificate of the trunk server"
        ) from exc
    return grpc.ssl_channel_credentials(roots)


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"wire.{name}={path} cannot be read: {exc.strerror}") from exc
