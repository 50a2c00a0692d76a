"""The errors that fedsplit raises: one root, and for each error a code and whether it is retryable.

An error is sent over the wire as its code and message, and a client decides by the code only. Each
class sets its code, the name of the gRPC status that carries it, and whether a retry with the same
identity can succeed. docs/reference/errors.md is made of the docstrings.
"""

from typing import ClassVar

_TEXT_LENGTH = 500


class FedsplitError(Exception):
    """The root of all errors of fedsplit.

    Args:
        message: One line: what was wrong, what was found, what to do.
        retry_after_s: The time to wait before a retry, in seconds.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


# --- mistakes of the user, and files that cannot be used -------------------------------------


class ConfigError(FedsplitError, ValueError):
    """A setting has an invalid value; the message names the field and the allowed values.

    To do: Correct the field or option that the message names; `--help` lists all of them.
    """

    code = "CONFIG"
    status = "INVALID_ARGUMENT"


class UnsupportedModel(FedsplitError, ValueError):
    """A model cannot be cut exactly; the message names the class and the cause.

    To do: Choose another model or another cut; the message says what is in the way.
    """

    code = "UNSUPPORTED_MODEL"
    status = "INVALID_ARGUMENT"


class DataError(FedsplitError, ValueError):
    """A corpus, a document or a partition of the data cannot be used.

    To do: Correct the file or field that the message, or the log of that SuperNode, names.
    """

    code = "DATA"
    status = "INVALID_ARGUMENT"


class CheckpointError(FedsplitError):
    """A checkpoint is incomplete, damaged, or different from its manifest.

    To do: Take another copy of the files; a run continues from an older checkpoint.
    """

    code = "CHECKPOINT_CORRUPT"
    status = "DATA_LOSS"


class StorageError(FedsplitError):
    """A file or a folder cannot be written; the message has the operating system's reason.

    To do: Make room, or correct the permissions, and start the same command again.
    """

    code = "STORAGE"
    status = "RESOURCE_EXHAUSTED"


class PrivacyBudget(FedsplitError):
    """A client's text would tell more than its privacy budget; the release was not sent.

    To do: End the run, use more noise (`privacy.z`), or raise `privacy.budget_bits`.
    """

    code = "PRIVACY_BUDGET"
    status = "FAILED_PRECONDITION"


# --- failures of the network and the peer, which are retryable --------------------------------


class ConnectionLost(FedsplitError):
    """No trunk answers at the address, or the connection was lost.

    To do: Start the server, or correct the address; calls are repeated for `wire.budget_s`.
    """

    code = "CONN_LOST"
    status = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(FedsplitError):
    """A call did not finish before its deadline.

    To do: Look at the log of the other side, or raise the limit that the message names.
    """

    code = "DEADLINE"
    status = "DEADLINE_EXCEEDED"
    retryable = True


class Draining(FedsplitError):
    """The server is shutting down and accepts no new work.

    To do: Start the server again; calls are repeated for `wire.budget_s`.
    """

    code = "DRAINING"
    status = "UNAVAILABLE"
    retryable = True


class Overloaded(FedsplitError):
    """A limit of the server (sessions, bytes, queue) is reached at the moment.

    To do: Wait, since calls are repeated; if it lasts, raise the limit that is named.
    """

    code = "OVERLOADED"
    status = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


# --- failures that need an action of the client before it tries again -------------------------


class ActivationExpired(FedsplitError):
    """The trunk dropped the graph of this forward; repeat the forward of the same batch.

    To do: Nothing; if it happens often, raise `wire.stash_ttl_s` or `wire.stash_bytes`.
    """

    code = "ACTIVATION_EXPIRED"
    status = "FAILED_PRECONDITION"


class StaleVersion(FedsplitError):
    """The trunk's parameters changed since this forward; repeat the step on the same batch.

    To do: Nothing in a run; in your own loop, run the forward again before the backward.
    """

    code = "STALE_VERSION"
    status = "FAILED_PRECONDITION"


class HistoryLost(FedsplitError):
    """The server lost the activations to which this forward is a delta; send whole activations.

    To do: Nothing; if it happens often, raise `wire.history_bytes`.
    """

    code = "HISTORY_LOST"
    status = "FAILED_PRECONDITION"


class SessionLost(FedsplitError):
    """The server has no session of this name, or has closed it; open a new one.

    To do: Nothing in a run and in generation; in your own loop, open a new session.
    """

    code = "SESSION_LOST"
    status = "NOT_FOUND"


class ServerRestarted(FedsplitError):
    """The trunk went back to an older version as its server was started again; do so as well.

    To do: Nothing for `fit` with `states`; else load the state of the version that is named.
    """

    code = "SERVER_RESTARTED"
    status = "FAILED_PRECONDITION"


class NonFinite(FedsplitError):
    """A tensor contains NaN or Inf; it was refused, and the trunk's state did not change.

    To do: Lower `train.lr`; the batch was skipped, and three in a row end the round.
    """

    code = "NONFINITE"
    status = "INVALID_ARGUMENT"


class GradExploded(FedsplitError):
    """A gradient is far larger than those before it; it was refused, and nothing has changed.

    To do: Lower `train.lr`, set `train.clip_norm`, or look at the client's data.
    """

    code = "GRAD_EXPLODED"
    status = "INVALID_ARGUMENT"


class Quarantined(FedsplitError):
    """The client is excluded for some time, because its contributions were refused in a row.

    To do: Look at the errors before this one; the message says when the client may return.
    """

    code = "QUARANTINED"
    status = "PERMISSION_DENIED"


# --- client and server do not agree, or one of them failed ------------------------------------


class ProtocolError(FedsplitError):
    """A frame cannot be read, or the session's state does not allow the request.

    To do: Run one version of fedsplit at both sides; in your own loop, keep the legal order.
    """

    code = "PROTOCOL"
    status = "FAILED_PRECONDITION"


class BadTensor(FedsplitError):
    """A tensor on the wire does not match its header or the agreement at Open.

    To do: Run one version of fedsplit, with the same model and config, at both sides.
    """

    code = "BAD_TENSOR"
    status = "INVALID_ARGUMENT"


class TooLarge(FedsplitError):
    """A tensor or message is larger than the agreed limit.

    To do: Send less at a time, or raise the limit that the message names at the trunk.
    """

    code = "TOO_LARGE"
    status = "RESOURCE_EXHAUSTED"


class ProtocolVersion(FedsplitError):
    """Client and server use different versions of the wire protocol.

    To do: Install the same version of fedsplit at both sides.
    """

    code = "PROTOCOL_VERSION"
    status = "UNIMPLEMENTED"


class ModelMismatch(FedsplitError):
    """Client and server hold parts of different models, or have different configs.

    To do: Start both sides from the same model, split, code, `conf/` and overrides.
    """

    code = "MODEL_MISMATCH"
    status = "FAILED_PRECONDITION"


class Unauthenticated(FedsplitError):
    """The token is missing or wrong.

    To do: Give the command the server's token, with `--token-file` or `FEDSPLIT_TOKEN`.
    """

    code = "UNAUTHENTICATED"
    status = "UNAUTHENTICATED"


class Forbidden(FedsplitError):
    """The token is valid, but the client may not use the session or the action.

    To do: Use the token of this client, and sessions that this client has opened.
    """

    code = "FORBIDDEN"
    status = "PERMISSION_DENIED"


class TlsFailed(FedsplitError):
    """Client and server could not establish an encrypted connection.

    To do: Name the right authority (`tls-ca`, `--tls-ca`), or renew the server's certificate.
    """

    code = "TLS_FAILED"
    status = "UNAVAILABLE"


class TrunkGone(FedsplitError):
    """No process listens at the trunk's address any more, so the run of its server has ended.

    To do: Look at the log of the server; the client takes part again when the run goes on.
    """

    code = "TRUNK_GONE"
    status = "UNAVAILABLE"


class Diverged(FedsplitError):
    """Training was stopped because it diverged or could not continue.

    To do: Lower `train.lr`, or look at the data of the clients.
    """

    code = "DIVERGED"
    status = "ABORTED"


class Internal(FedsplitError):
    """A bug of fedsplit at the peer; the peer's log has the details.

    To do: Look at the log of the other side, which has the traceback, and report it.
    """


def one_line(text: str) -> str:
    """Return a text of a peer or a library without line ends and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def peer_text(text: str) -> str:
    """Return a text of a peer as one line of at most 500 printable characters.

    >>> peer_text(f"no session s1{chr(27)}[2J")
    'no session s1 [2J'
    """
    # Cut first, since the text may be as long as a message.
    line = one_line(text[: 2 * _TEXT_LENGTH])
    return line if len(line) <= _TEXT_LENGTH else f"{line[: _TEXT_LENGTH - 4]} ..."


def error_text(error: Exception) -> str:
    """Return the text with which a program reports an error.

    An error of another library becomes one line that begins with its class, because its text often
    does not say enough.

    >>> error_text(ConfigError("seed=-1 is too small"))
    'seed=-1 is too small'
    >>> error_text(KeyError("wte"))
    "KeyError: 'wte' (--debug shows the traceback)"
    """
    if isinstance(error, FedsplitError | OSError):
        return str(error)
    # Some libraries list every parameter of a model.
    text = peer_text(str(error)) or "no message"
    return f"{type(error).__name__}: {text} (--debug shows the traceback)"


def _family(cls: type[FedsplitError]) -> list[type[FedsplitError]]:
    return [cls] + [child for sub in cls.__subclasses__() for child in _family(sub)]


def error_from_code(code: str, message: str, retry_after_s: float = 0.0) -> FedsplitError:
    """The error with this code, as a peer sent it; `Internal` if the code is unknown.

    >>> error_from_code("SESSION_LOST", "no session s1").__class__.__name__
    'SessionLost'
    """
    # Not the root: its code is that of `Internal`.
    by_code = {cls.code: cls for cls in _family(FedsplitError) if cls is not FedsplitError}
    return by_code.get(code, Internal)(peer_text(message), retry_after_s=retry_after_s)
