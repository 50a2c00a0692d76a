"""What is in the files of certificates and requests, as rows for people."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsplit.certs import pem
from fedsplit.errors import ConfigError

Row = tuple[str, str]


def rows_of(file: Path, now: datetime) -> Iterator[list[Row]]:
    """Yield the rows of a file's request, or of each of its certificates.

    Args:
        file: A file in PEM.
        now: The time, with its time zone, from which the days that are left are counted.

    Raises:
        ConfigError: The file cannot be read, or has neither.
    """
    kind = pem.kind_of(file)
    if "PRIVATE KEY" in kind:
        raise ConfigError(f"{file} is a private key, and is not shown; give a certificate")
    if "REQUEST" in kind:
        yield [("request", str(file)), *_names(pem.read_request(file))]
        return
    for certificate in pem.read_certificates(file):
        yield _certificate_rows(file, certificate, now)


def _certificate_rows(file: Path, certificate: x509.Certificate, now: datetime) -> list[Row]:
    until = certificate.not_valid_after_utc
    left = f"{(until - now).days} days left" if until > now else "EXPIRED"
    return [
        ("authority" if is_authority(certificate) else "certificate", str(file)),
        *_names(certificate),
        ("signed by", certificate.issuer.rfc4514_string()),
        ("valid from", date_text(certificate.not_valid_before_utc)),
        ("valid until", f"{date_text(until)}, {left}"),
        ("SHA-256", certificate.fingerprint(hashes.SHA256()).hex(":")),
    ]


def _names(content: x509.Certificate | x509.CertificateSigningRequest) -> list[Row]:
    names = pem.texts(pem.alternative_names(content))
    rows = [("subject", content.subject.rfc4514_string())]
    return [*rows, ("names", ", ".join(names))] if names else rows


def is_authority(certificate: x509.Certificate) -> bool:
    """Return whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def date_text(date: datetime) -> str:
    """Return a date in UTC.

    >>> from datetime import UTC
    >>> date_text(datetime(2030, 1, 2, 3, 4, tzinfo=UTC))
    '2030-01-02 03:04 UTC'
    """
    return f"{date:%Y-%m-%d %H:%M} UTC"
