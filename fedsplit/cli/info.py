"""The command `info`: the properties of a running trunk server."""

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import CLIENT_OPTIONS, Command, TlsCa, TokenFile, naming, read_token
from fedsplit.errors import ConfigError
from fedsplit.spec import WireSpec

_INFO_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Info(Command):
    """Show the properties of a running trunk server."""

    example: ClassVar[str] = "127.0.0.1:9500"

    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="host:port, or unix:path")]
    tls_ca: TlsCa = ""
    token_file: TokenFile = ""

    def run(self) -> None:
        """Print a line for each property of the server."""
        if ":" not in self.address:
            raise ConfigError(f"ADDRESS={self.address!r} is neither host:port nor unix:path")
        # gRPC would log a failed connection beside our error line.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from fedsplit.console import table_text
        from fedsplit.transport.client import GrpcLink
        from fedsplit.wire.messages import ServiceInfoRequest

        wire = WireSpec(tls_ca=self.tls_ca, call_deadline_s=_INFO_DEADLINE_S)
        token = read_token(self.token_file)
        with (
            naming(CLIENT_OPTIONS),
            closing(GrpcLink(self.address, token=token, wire=wire)) as link,
        ):
            info = link.exchange(ServiceInfoRequest())
        limits = info.limits
        rows = {
            "family": info.family,
            "blocks (bottom/trunk/top)": info.blocks,
            "fingerprint of model and cut": info.model,
            "parameter version": info.version,
            "open sessions": info.sessions,
            "largest request": f"{limits.max_rows} sequences of {limits.max_tokens} tokens",
            "hidden size": limits.hidden_size,
            "wire protocol": info.protocol,
            "server_instance_id of the server": info.server_instance_id,
        }
        rows |= {f"in use: {name}": value for name, value in sorted(info.budgets.items())}
        if info.served_model_names:
            rows["trunks here, by name"] = ", ".join(info.served_model_names)
        print(table_text([(name, str(value)) for name, value in rows.items()]))
