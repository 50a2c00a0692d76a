"""The certificate authority: its key and certificate in a folder, and what it signs."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedsplit.certs import pem
from fedsplit.errors import ConfigError

KEY, CERTIFICATE = "ca.key", "ca.crt"

# Clocks of machines differ, and a certificate that begins in the future is refused.
_EARLIER = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An authority, with its private key."""

    certificate: x509.Certificate
    key: pem.PrivateKey

    @staticmethod
    def create(folder: Path, *, name: str, days: int, now: datetime) -> "Authority":
        """Make an authority, `ca.key` and `ca.crt`, in a folder.

        Args:
            folder: The authority's folder.
            name: What people read in its certificates.
            days: The number of days for which clients can trust it.
            now: The time, with its time zone.

        Raises:
            ConfigError: There is an authority already.
            StorageError: A file cannot be written.
        """
        subject = pem.common_name(name)
        key = pem.new_key(folder / KEY)
        certificate = (
            _builder(subject, key, subject, key.public_key(), now, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem.write(folder / CERTIFICATE, certificate)
        return Authority(certificate=certificate, key=key)

    @staticmethod
    def read(folder: Path) -> "Authority":
        """Return the authority of a folder.

        Raises:
            ConfigError: A file cannot be read, or the two do not belong together.
        """
        key = pem.read_key(folder / KEY)
        certificate = pem.read_certificates(folder / CERTIFICATE)[0]
        if certificate.public_key() != key.public_key():
            raise ConfigError(
                f"{folder / CERTIFICATE} is not the certificate of {folder / KEY}; give the folder "
                "that `fedsplit certs init` wrote"
            )
        return Authority(certificate=certificate, key=key)

    def sign(
        self, request: x509.CertificateSigningRequest, *, days: int, now: datetime
    ) -> x509.Certificate:
        """Return a server's certificate with the names and the public key of its request.

        Nothing else of the request is taken, so a request cannot make another authority.

        Raises:
            ConfigError: The request has no names, or the authority expires before the certificate.
        """
        names, until = pem.alternative_names(request), now + timedelta(days=days)
        if not pem.texts(names):
            raise ConfigError(
                "the request has no names in its subjectAltName, and clients read no others; make "
                "it with `fedsplit certs request NAME`"
            )
        if until > self.certificate.not_valid_after_utc:
            left = (self.certificate.not_valid_after_utc - now).days
            raise ConfigError(
                f"--days={days} is longer than the authority lives, which expires in {left} days; "
                "give fewer, or make a new authority and copy its ca.crt to the clients"
            )
        return (
            _builder(
                self.certificate.subject,
                self.key,
                request.subject,
                request.public_key(),
                now,
                until,
            )
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def _builder(
    issuer: x509.Name,
    issuer_key: pem.PrivateKey,
    subject: x509.Name,
    public: CertificatePublicKeyTypes,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(of_issuer, critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
