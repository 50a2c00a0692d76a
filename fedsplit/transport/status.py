"""The conversion of our errors to gRPC's and back; clients decide by our code only."""

import re

import grpc

from fedsplit import errors
from fedsplit.errors import FedsplitError, error_from_code, one_line, peer_text

TOKEN_KEY = "fedsplit-token"
MAX_METADATA_BYTES = 16384
# Keeps the trailing metadata well below MAX_METADATA_BYTES.
_MAX_DETAIL = 2000

_TLS = "handshake failed|ssl_error|certificate|hostname verification"
_NOT_SECURE = "no encrypted connection to {address}: "
_FALLBACKS: tuple[tuple[str, str, type[FedsplitError], str], ...] = (
    (
        "UNAVAILABLE",
        "certificate has expired",
        errors.TlsFailed,
        _NOT_SECURE + "its certificate, or that of its authority, has expired; sign the server's "
        "request again (fedsplit certs sign), and start the server with the new certificate. If "
        "it is valid, correct the clock of this machine",
    ),
    (
        "UNAVAILABLE",
        "certificate is not yet valid",
        errors.TlsFailed,
        _NOT_SECURE + "its certificate begins in the future; correct the clock of this machine, or "
        "that of the authority and sign the server's request again (fedsplit certs sign)",
    ),
    (
        "UNAVAILABLE",
        "hostname verification",
        errors.TlsFailed,
        _NOT_SECURE + "its certificate does not name this address; call the server by a name of "
        "its certificate (fedsplit certs show), or make one with this name (fedsplit certs "
        "request)",
    ),
    (
        "UNAVAILABLE",
        "local issuer|certificate signature failure|self.signed certificate",
        errors.TlsFailed,
        _NOT_SECURE + "its certificate is not one of the authority in wire.tls_ca; name the "
        "certificate of the authority that signed it (fedsplit certs show tells which)",
    ),
    (
        "UNAVAILABLE",
        _TLS,
        errors.TlsFailed,
        _NOT_SECURE + "{details}; check that the trunk server has TLS on, "
        "that wire.tls_ca is its authority's certificate and that its own certificate has not "
        "expired and names this address",
    ),
    (
        "UNAVAILABLE|CANCELLED",
        "",
        errors.ConnectionLost,
        "no trunk answers at {address}: {details}; check that the trunk server is running, that "
        "this is its address, and that both sides agree on TLS (wire.tls_ca)",
    ),
    (
        "DEADLINE_EXCEEDED",
        "",
        errors.DeadlineExceeded,
        "the trunk at {address} did not answer within wire.call_deadline_s={deadline_s:g} s",
    ),
    (
        "RESOURCE_EXHAUSTED",
        "concurrent",
        errors.Overloaded,
        "the trunk at {address} has as many calls as it takes: {details}",
    ),
    (
        "RESOURCE_EXHAUSTED",
        "",
        errors.TooLarge,
        "a message is larger than the trunk at {address} takes: {details}",
    ),
    (
        "UNIMPLEMENTED",
        "",
        errors.ProtocolVersion,
        "the server at {address} does not offer fedsplit.v1.ComputeService: {details}",
    ),
    ("", "", errors.Internal, "a call to {address} ended with {status}: {details}"),
)
"""Our errors for gRPC's own: status, pattern of its text, our class and our text; first match."""


def set_status(context: grpc.ServicerContext, error: FedsplitError) -> None:
    """Give a call the error's gRPC status, and its code in the trailing metadata."""
    # Metadata values must be ASCII on one line.
    detail = one_line(str(error)).encode("ascii", "backslashreplace").decode()
    detail = detail[:_MAX_DETAIL]
    context.set_trailing_metadata(
        (
            ("fedsplit-code", error.code),
            ("fedsplit-retryable", str(error.retryable).lower()),
            ("fedsplit-retry-after-ms", str(round(1000 * error.retry_after_s))),
            ("fedsplit-detail", detail),
        )
    )
    context.set_code(grpc.StatusCode[error.status])
    context.set_details(detail)


def is_rpc_error(exc: Exception) -> bool:
    """Whether a call over gRPC failed, and not what came before or after it."""
    return isinstance(exc, grpc.RpcError)


def is_refused(exc: grpc.RpcError) -> bool:
    """Whether no process listens at the address, though its machine answers."""
    # The words of the operating system, of a missing socket file as well.
    refused = re.search("connection refused|no such file", exc.details() or "", re.IGNORECASE)
    return exc.code() is grpc.StatusCode.UNAVAILABLE and refused is not None


def from_rpc_error(exc: grpc.RpcError, address: str, deadline_s: float) -> FedsplitError:
    """The trunk's error if the metadata has its code, or else the error for gRPC's status."""
    metadata = {item.key: str(item.value) for item in exc.trailing_metadata() or ()}
    if code := metadata.get("fedsplit-code"):
        wait_ms = metadata.get("fedsplit-retry-after-ms", "")
        # The peer sent it, so it may be anything.
        wait_s = int(wait_ms) / 1000 if re.fullmatch(r"\d{1,9}", wait_ms) else 0.0
        return error_from_code(code, metadata.get("fedsplit-detail", ""), wait_s)
    return from_status(exc.code().name, exc.details() or "", address, deadline_s)


def from_status(status: str, details: str, address: str, deadline_s: float) -> FedsplitError:
    """The error for a gRPC status that came without a code of ours."""
    cls, text = next(
        (cls, text)
        for name, part, cls, text in _FALLBACKS
        if re.search(name, status) and re.search(part, details, re.IGNORECASE)
    )
    details = peer_text(details)
    return cls(text.format(address=address, status=status, details=details, deadline_s=deadline_s))
