"""The PEM files of keys, requests and certificates: how they are written and read."""

import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedsplit import atomic
from fedsplit.errors import ConfigError

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

SUBJECT_CHARACTERS = 64
"""The longest common name; a host name may be longer."""

_PEM = serialization.Encoding.PEM


def new_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Make a private key, P-256, in a file that only its owner can read.

    Raises:
        ConfigError: There is a file of this name.
        StorageError: It cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    if not atomic.create_secret(file, key.private_bytes(_PEM, form, plain)):
        raise ConfigError(
            f"{file} is there already, and a certificate of it would not be valid any more; "
            "give another folder. To renew a certificate, sign its request again"
        )
    return key


def read_key(file: Path) -> PrivateKey:
    """Return the private key of a file.

    Raises:
        ConfigError: The file cannot be read, or has no key for certificates.
    """
    content = _bytes_of(file)
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{file} is not a private key without a passphrase: {exc}") from exc
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{file} is a {type(key).__name__}; give a key of an elliptic curve")
    return key


def write(file: Path, content: x509.Certificate | x509.CertificateSigningRequest) -> None:
    """Write a certificate or a request, and replace a file of this name.

    Raises:
        StorageError: It cannot be written.
    """
    atomic.write_text(file, content.public_bytes(_PEM).decode("ascii"))


def read_certificates(file: Path) -> list[x509.Certificate]:
    """Return the certificates of a file, in their order.

    Raises:
        ConfigError: The file cannot be read, or has no certificate.
    """
    content = _bytes_of(file)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as exc:
        raise ConfigError(f"{file} has no certificate that can be read: {exc}") from exc


def read_request(file: Path) -> x509.CertificateSigningRequest:
    """Return the request of a file.

    Raises:
        ConfigError: The file cannot be read, has no request, or was changed after it was made.
    """
    content = _bytes_of(file)
    try:
        request = x509.load_pem_x509_csr(content)
        is_whole = request.is_signature_valid
    except ValueError as exc:
        raise ConfigError(f"{file} has no request that can be read: {exc}") from exc
    if not is_whole:
        raise ConfigError(
            f"{file} is not signed with the key that it names; make it again with "
            "`fedsplit certs request`"
        )
    return request


def alternative_names(
    content: x509.Certificate | x509.CertificateSigningRequest,
) -> x509.SubjectAlternativeName:
    """Return the names of a server in its certificate or request; none if it has none."""
    try:
        return content.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def texts(names: x509.SubjectAlternativeName) -> Sequence[str]:
    """Return the DNS names and addresses as text.

    >>> texts(x509.SubjectAlternativeName([x509.DNSName("a.org"), x509.DNSName("b.org")]))
    ['a.org', 'b.org']
    """
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *map(str, addresses)]


def common_name(name: str) -> x509.Name:
    """Return the subject of a certificate, which is for people; programs read other names.

    Raises:
        ConfigError: The name is empty or too long.
    """
    if not 0 < len(name) <= SUBJECT_CHARACTERS:
        raise ConfigError(
            f"{name!r} has {len(name)} characters; a name has 1 to {SUBJECT_CHARACTERS} of them"
        )
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def kind_of(file: Path) -> str:
    """Return what the first line of a file in PEM says that it is, such as "CERTIFICATE".

    Raises:
        ConfigError: The file cannot be read, or has no such line.
    """
    if found := re.search(rb"^-----BEGIN ([A-Z ]+)-----\s*$", _bytes_of(file), re.MULTILINE):
        return found[1].decode("ascii")
    raise ConfigError(f"{file} is not in PEM; it has no line -----BEGIN ...-----")


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror}") from exc
