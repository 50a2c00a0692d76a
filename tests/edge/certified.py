"""A server's certificate of an authority of its own, as `fedsplit certs` makes it."""

from datetime import UTC, datetime
from pathlib import Path

from fedsplit.certs import pem
from fedsplit.certs.authority import Authority
from fedsplit.certs.request import make_request
from fedsplit.spec import WireSpec


def certified(
    folder: Path,
    *names: str,
    now: datetime | None = None,
    days: int = 365,
    address: str = "127.0.0.1:0",
    authority: str = "",
) -> WireSpec:
    """A wire with the files of a new authority and of a server, in `folder`.

    `now` is when the certificate was signed. The authority is valid in any case.
    """
    today = datetime.now(UTC)
    name = authority or folder.name
    signer = Authority.create(folder / "ca", name=name, days=3650, now=today)
    request = make_request(names or ("server.example.org",), folder)
    signed = signer.sign(pem.read_request(request), days=days, now=now or today)
    pem.write(request.with_suffix(".crt"), signed)
    return WireSpec(
        bind=address,
        tls_cert=str(request.with_suffix(".crt")),
        tls_key=str(request.with_suffix(".key")),
        tls_ca=str(folder / "ca" / "ca.crt"),
    )
