"""Every failure fedsplit reports: one root, one code each, and whether trying again can help.

The codes are what travels on the wire; clients decide on the code alone. A subclass that a
peer can raise is listed once, in its class body, with its code, the gRPC status name it
travels under and whether a retry with the same identity can succeed.
"""

from typing import ClassVar


class FedsplitError(Exception):
    """The root of all errors that fedsplit raises on purpose.

    Args:
        message: One line: what was wrong, what was there, what to do.
        retry_after_s: How long the peer asks to wait before a retry, in seconds.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


# --- what the user asked for cannot be done -------------------------------------------------


class ConfigError(FedsplitError, ValueError):
    """A setting has a value that is not allowed; names the field, the value and what is."""

    code = "CONFIG"
    status = "INVALID_ARGUMENT"


class UnsupportedModel(FedsplitError, ValueError):
    """A model cannot be cut exactly; names the class and the cause."""

    code = "UNSUPPORTED_MODEL"
    status = "INVALID_ARGUMENT"


class DataError(FedsplitError, ValueError):
    """A corpus, a document or a sharding cannot be used as asked."""

    code = "DATA"
    status = "INVALID_ARGUMENT"


class CheckpointError(FedsplitError):
    """A checkpoint is missing something, or is not what its manifest says."""

    code = "CHECKPOINT_CORRUPT"
    status = "DATA_LOSS"


class StorageError(FedsplitError):
    """A file or a folder cannot be written; names it and the operating system's reason."""

    code = "STORAGE"
    status = "RESOURCE_EXHAUSTED"


# --- the network and the peer: worth another try ---------------------------------------------


class ConnectionLost(FedsplitError):
    """No trunk answers at the address, or the connection broke."""

    code = "CONN_LOST"
    status = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(FedsplitError):
    """A call did not end inside its deadline."""

    code = "DEADLINE"
    status = "DEADLINE_EXCEEDED"
    retryable = True


class Draining(FedsplitError):
    """The server is shutting down and takes no new work."""

    code = "DRAINING"
    status = "UNAVAILABLE"
    retryable = True


class Overloaded(FedsplitError):
    """A budget of the server (sessions, bytes, queue) is used up for now."""

    code = "OVERLOADED"
    status = "RESOURCE_EXHAUSTED"
    retryable = True


# --- the client has to do something before it tries again ------------------------------------


class ActivationExpired(FedsplitError):
    """The graph of this forward is gone: repeat the forward of the same batch."""

    code = "ACTIVATION_EXPIRED"
    status = "FAILED_PRECONDITION"


class StaleVersion(FedsplitError):
    """The trunk has moved on since this forward: repeat the step on the same batch."""

    code = "STALE_VERSION"
    status = "FAILED_PRECONDITION"


class HistoryLost(FedsplitError):
    """The server has lost activations that this forward is a difference from: send them again."""

    code = "HISTORY_LOST"
    status = "FAILED_PRECONDITION"


class SessionLost(FedsplitError):
    """The server does not know this session (any more): open a new one."""

    code = "SESSION_LOST"
    status = "NOT_FOUND"


class NonFinite(FedsplitError):
    """A tensor holds NaN or Inf; it was refused and nothing was changed."""

    code = "NONFINITE"
    status = "INVALID_ARGUMENT"


# --- the two sides do not fit together --------------------------------------------------------


class ProtocolError(FedsplitError):
    """A frame that cannot be read, or a request that its session's state does not allow."""

    code = "PROTOCOL"
    status = "FAILED_PRECONDITION"


class BadTensor(FedsplitError):
    """A tensor on the wire is not what its header, or the agreement, says."""

    code = "BAD_TENSOR"
    status = "INVALID_ARGUMENT"


class TooLarge(FedsplitError):
    """A tensor or message is larger than the agreed limit."""

    code = "TOO_LARGE"
    status = "RESOURCE_EXHAUSTED"


class ProtocolVersion(FedsplitError):
    """The two sides speak different versions of the wire protocol."""

    code = "PROTOCOL_VERSION"
    status = "UNIMPLEMENTED"


class ModelMismatch(FedsplitError):
    """The two sides hold parts of different models, or were configured differently."""

    code = "MODEL_MISMATCH"
    status = "FAILED_PRECONDITION"


class Unauthenticated(FedsplitError):
    """The token is missing or wrong."""

    code = "UNAUTHENTICATED"
    status = "UNAUTHENTICATED"


class Forbidden(FedsplitError):
    """The token is right, but the session or the action is not this client's."""

    code = "FORBIDDEN"
    status = "PERMISSION_DENIED"


class TlsFailed(FedsplitError):
    """The two sides could not agree on an encrypted connection."""

    code = "TLS_FAILED"
    status = "UNAVAILABLE"


class Diverged(FedsplitError):
    """Training broke down and was stopped."""

    code = "DIVERGED"
    status = "ABORTED"


class Internal(FedsplitError):
    """A fault of ours, at the other side; its log has the details."""


def _family(cls: type[FedsplitError]) -> list[type[FedsplitError]]:
    return [cls] + [child for sub in cls.__subclasses__() for child in _family(sub)]


def error_from_code(code: str, message: str, retry_after_s: float = 0.0) -> FedsplitError:
    """The error that a peer named by its code; an unknown code is `Internal`.

    >>> error_from_code("SESSION_LOST", "no session s1").__class__.__name__
    'SessionLost'
    """
    by_code = {cls.code: cls for cls in _family(FedsplitError) if cls is not FedsplitError}
    return by_code.get(code, Internal)(message, retry_after_s=retry_after_s)
