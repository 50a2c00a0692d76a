"""Checks of certificates: of the servers as they present them, of the authority, and of one's own.

Whether a certificate is of the authority, names the server and is valid now are three checks, each
with a handshake or a reading that is indifferent to the other two.
"""

import ssl
import stat
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedsplit.certs import pem
from fedsplit.certs.request import LOCAL_NAMES
from fedsplit.certs.show import date_text, is_authority
from fedsplit.doctor.network import connected, host_and_port
from fedsplit.doctor.result import Result, fail, ok, skipped, warn
from fedsplit.errors import ConfigError, peer_text
from fedsplit.spec import WireSpec
from fedsplit.transport.tls import server_credentials

_SOON = timedelta(days=30)
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python does not name.
_ANY_TIME = 0x200000

_RENEW = (
    "sign the server's request again (fedsplit certs sign), copy the certificate to the server and "
    "start the server again"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """What a server presents in a TLS handshake.

    Attributes:
        error: Why there was no handshake; empty if there was one.
        certificate: Its certificate.
        chain_error: OpenSSL's reason against its chain; empty if the authority signed it.
        name_error: OpenSSL's reason against its names; empty if they have the address.
    """

    error: str = ""
    certificate: x509.Certificate | None = None
    chain_error: str = ""
    name_error: str = ""


def presented(address: str, tls_ca: str) -> Presented:
    """Make handshakes with a server, and return what it presents.

    Raises:
        ConfigError: The authority's file cannot be read, or has no certificate.
    """
    pem.read_certificates(Path(tls_ca))
    try:
        untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        untrusting.check_hostname, untrusting.verify_mode = False, ssl.CERT_NONE
        certificate = _handshake(untrusting, address)
        trusting = ssl.create_default_context(cafile=tls_ca)
        trusting.verify_flags |= _ANY_TIME
        trusting.check_hostname = False
        chain_error = _refusal(trusting, address)
        trusting.check_hostname = True
        name_error = "" if chain_error else _refusal(trusting, address)
    except (OSError, ValueError, ConfigError) as exc:
        return Presented(error=peer_text(str(exc)) or type(exc).__name__)
    return Presented(certificate=certificate, chain_error=chain_error, name_error=name_error)


def _refusal(context: ssl.SSLContext, address: str) -> str:
    try:
        _handshake(context, address)
    except ssl.SSLCertVerificationError as exc:
        return peer_text(exc.verify_message)
    return ""


def _handshake(context: ssl.SSLContext, address: str) -> x509.Certificate:
    # A server of gRPC speaks HTTP/2 only.
    context.set_alpn_protocols(["h2", "http/1.1"])
    with closing(connected(address)) as plain:
        host = "" if address.startswith("unix:") else host_and_port(address)[0]
        with context.wrap_socket(plain, server_hostname=host or "localhost") as secure:
            return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")


def check_chain(name: str, found: Presented) -> Result:
    """Check that a server's certificate is of the authority that this machine trusts."""
    name = f"{name} certificate chain"
    if found.error or found.certificate is None:
        return fail(
            name,
            f"no TLS handshake: {found.error}",
            "start the server with its TLS files, or leave out --tls-ca if it has none",
        )
    issuer = peer_text(found.certificate.issuer.rfc4514_string())
    if found.chain_error:
        return fail(
            name,
            f"its certificate, of {issuer}, is not of the authority of --tls-ca "
            f"({found.chain_error})",
            "give the certificate of the authority that signed it (fedsplit certs show FILE tells "
            "names), or have the server's request signed by the authority of --tls-ca",
        )
    return ok(name, f"its certificate is of {issuer}, which --tls-ca trusts")


def check_name(name: str, address: str, found: Presented) -> Result:
    """Check that a server's certificate has the name by which it is called."""
    name = f"{name} certificate name"
    if found.certificate is None or found.chain_error:
        return skipped(name, "its chain has to be right first")
    names = peer_text(", ".join(pem.texts(pem.alternative_names(found.certificate))))
    if found.name_error:
        return fail(
            name,
            f"it is for {names or 'no name'}, but the server is called {address}",
            "call the server by a name of its certificate, or request one with this name "
            "(fedsplit certs request)",
        )
    return ok(name, f"it is for {names}")


def check_expiry(name: str, found: Presented, now: datetime) -> Result:
    """Check that a server's certificate is valid now, and for some time."""
    name = f"{name} certificate expiry"
    if found.certificate is None:
        return skipped(name, "no certificate was presented")
    return _dates(name, found.certificate, now, _RENEW)


def _dates(name: str, certificate: x509.Certificate, now: datetime, renew: str) -> Result:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return fail(
            name,
            f"it is valid from {date_text(begin)}, and it is {date_text(now)} here",
            "correct the clock of this machine or of the authority",
        )
    if now > end:
        return fail(name, f"it expired at {date_text(end)}, and it is {date_text(now)} here", renew)
    if now > end - _SOON:
        return warn(name, f"it expires at {date_text(end)}", renew)
    return ok(name, f"it is valid until {date_text(end)}")


def check_authority(tls_ca: str, now: datetime) -> Result:
    """Check that the trusted file has the certificate of an authority, which is valid."""
    name = "authority"
    if not tls_ca:
        return skipped(name, "no --tls-ca was given, so connections are not encrypted")
    try:
        certificate = pem.read_certificates(Path(tls_ca))[0]
    except ConfigError as exc:
        return fail(name, str(exc), "copy ca.crt of the authority to this machine")
    is_own = certificate.issuer == certificate.subject
    if not (is_authority(certificate) or is_own):
        return fail(
            name,
            f"{tls_ca} is the certificate of a server and not of an authority",
            "give ca.crt, the file that fedsplit certs init wrote",
        )
    renew = "make a new authority (fedsplit certs init), sign all requests, and copy its ca.crt"
    return _dates(name, certificate, now, renew)


def check_own(cert: str, key: str, tls_ca: str, now: datetime) -> Iterable[Result]:
    """Check the certificate and the key with which this machine serves."""
    name = "own certificate"
    if not (cert and key):
        return [skipped(name, "no --tls-cert and --tls-key were given")]
    try:
        server_credentials(WireSpec(tls_cert=cert, tls_key=key))
        certificate = pem.read_certificates(Path(cert))[0]
        authorities = pem.read_certificates(Path(tls_ca)) if tls_ca else []
    except ConfigError as exc:
        return [fail(name, str(exc), "give server.crt and server.key of one request")]
    return [
        _dates(name, certificate, now, _RENEW),
        _own_issuer(certificate, authorities),
        _own_names(certificate),
        check_secret("own key", key),
    ]


def _own_issuer(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> Result:
    name = "own certificate chain"
    if not authorities:
        return skipped(name, "no --tls-ca was given")
    if any(certificate == each or _signed(certificate, each) for each in authorities):
        return ok(name, "it is of the authority of --tls-ca")
    return fail(
        name,
        f"it is of {certificate.issuer.rfc4514_string()} and not of the authority of --tls-ca",
        "have the request signed by that authority, or give its ca.crt to all clients",
    )


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _own_names(certificate: x509.Certificate) -> Result:
    name = "own certificate name"
    names, local = pem.texts(pem.alternative_names(certificate)), LOCAL_NAMES[1]
    if local in names:
        return ok(name, f"it is for {', '.join(names)}")
    return warn(
        name,
        f"it is for {', '.join(names) or 'no name'}, without {local}, where a SuperLink's own "
        "processes call it; their runs stay pending",
        "request one with fedsplit certs request, which adds it",
    )


def check_secret(name: str, file: str) -> Result:
    """Check that only its owner can read a file with a secret."""
    if not file:
        return skipped(name, "no file was given")
    try:
        mode = stat.S_IMODE(Path(file).stat().st_mode)
    except OSError as exc:
        return fail(name, f"{file} cannot be read: {exc.strerror}", "correct the path")
    if mode & 0o077:
        return warn(name, f"{file} can be read by other users (mode {mode:o})", f"chmod 600 {file}")
    return ok(name, f"{file} can be read by its owner only")


def today(seconds: float) -> datetime:
    """Return a time in seconds since the epoch as a date."""
    return datetime.fromtimestamp(seconds, UTC)
