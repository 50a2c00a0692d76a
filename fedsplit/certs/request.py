"""The request of a server: its new key, which stays with it, and what the authority signs."""

import ipaddress
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsplit.certs import pem
from fedsplit.errors import ConfigError

LOCAL_NAMES = ("localhost", "127.0.0.1")
"""Names in every request, since a SuperLink's own processes call it there."""

KEY, REQUEST = "server.key", "server.csr"
_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"


def make_request(names: Sequence[str], folder: Path) -> Path:
    """Make a key and a request for a server, `server.key` and `server.csr`.

    Args:
        names: The host names and IP addresses at which clients call the server.
        folder: The folder of both files on the server's machine.

    Returns:
        The file of the request.

    Raises:
        ConfigError: A name is neither a host name nor an IP address, or there is a key already.
        StorageError: A file cannot be written.
    """
    wanted = list(dict.fromkeys(map(_general_name, (*names, *LOCAL_NAMES))))
    key = pem.new_key(folder / KEY)
    subject = pem.common_name(names[0][: pem.SUBJECT_CHARACTERS])
    builder = x509.CertificateSigningRequestBuilder(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    pem.write(folder / REQUEST, builder.sign(key, hashes.SHA256()))
    return folder / REQUEST


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        address = ipaddress.ip_address(name)
        # A server listens there, and nobody calls it so.
        if not address.is_unspecified:
            return x509.IPAddress(address)
    # A last label of digits only would be read as an address.
    if re.fullmatch(rf"(?=.{{1,253}}$)(\*\.)?({_LABEL}\.)*(?!\d+$){_LABEL}", name):
        return x509.DNSName(name.lower())
    raise ConfigError(
        f"{name!r} is neither a host name nor an IP address of a server; give its name as "
        "clients call it, without a port"
    )
