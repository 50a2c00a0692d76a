"""The commands `certs init`, `request`, `sign` and `show`: the certificates of a deployment."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import Command

Days = Annotated[int, typer.Option(metavar="N", help="days for which it is valid", min=1, max=7300)]


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Init(Command):
    """Make an authority that signs the certificates of servers."""

    example: ClassVar[str] = "--out authority"

    out: Annotated[
        str, typer.Option(metavar="DIR", help="folder for ca.key, which stays there, and ca.crt")
    ]
    name: Annotated[
        str, typer.Option(metavar="TEXT", help="what people read in its certificates")
    ] = "fedsplit authority"
    days: Days = 3650

    def run(self) -> None:
        """Write the authority's key and certificate."""
        from fedsplit.certs.authority import CERTIFICATE, KEY, Authority

        folder = Path(self.out)
        Authority.create(folder, name=self.name, days=self.days, now=_now())
        print(f"{folder / KEY}: the authority's key; keep it here, readable by you only")
        print(f"{folder / CERTIFICATE}: copy it to every machine; clients trust it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Command):
    """Make a server's key, and the request for its certificate."""

    example: ClassVar[str] = "server.example.org --out tls"

    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="host names and addresses of the server, as clients call it, without ports; "
            "localhost and 127.0.0.1 are added",
        ),
    ]
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="folder for server.key, which stays there, and server.csr"
        ),
    ]

    def run(self) -> None:
        """Write the key and the request."""
        from fedsplit.certs.request import KEY, make_request

        request = make_request(self.names, Path(self.out))
        print(f"{request.with_name(KEY)}: the server's key; keep it here")
        print(f"{request}: copy it to the authority, for `fedsplit certs sign`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign(Command):
    """Sign the request of a server, at the authority; again to renew the certificate."""

    example: ClassVar[str] = "tls/server.csr --ca authority"

    request: Annotated[
        str, typer.Argument(metavar="REQUEST", help="a file that `fedsplit certs request` wrote")
    ]
    ca: Annotated[str, typer.Option(metavar="DIR", help="the authority's folder")]
    days: Days = 365

    def run(self) -> None:
        """Write the certificate beside the request."""
        from fedsplit.certs import pem
        from fedsplit.certs.authority import Authority
        from fedsplit.certs.show import date_text

        request = Path(self.request)
        content = pem.read_request(request)
        signed = Authority.read(Path(self.ca)).sign(content, days=self.days, now=_now())
        made = request.with_suffix(".crt")
        pem.write(made, signed)
        names = ", ".join(pem.texts(pem.alternative_names(signed)))
        print(f"{made}: for {names}; valid until {date_text(signed.not_valid_after_utc)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Show(Command):
    """Show the names, the dates and the fingerprint of certificates and requests."""

    example: ClassVar[str] = "tls/server.crt"

    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="certificates and requests in PEM")
    ]

    def run(self) -> None:
        """Print a table for each certificate."""
        from fedsplit.certs.show import rows_of
        from fedsplit.console import table_text

        shown = [rows for file in self.files for rows in rows_of(Path(file), _now())]
        print("\n\n".join(map(table_text, shown)))
