"""The content of a client's reply: checked, and made anew, before anything else uses it.

A peer may send anything. The functions of this file read the records, numbers and arrays that a
reply must have, refuse all others, and return new content that holds checked values only. So a
strategy, which averages replies, never sees what a peer made.
"""

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsplit import errors
from fedsplit.data.tasks import COUNTS
from fedsplit.errors import BadTensor, ModelMismatch, NonFinite, ProtocolError
from fedsplit.flower.client_arrays import shapes_of, unpacked
from fedsplit.flower.npy import values_of
from fedsplit.flower.records import ARRAYS, METRICS, TOLD_NOTHING, WEIGHT
from fedsplit.flower.sealed_arrays import is_sealed, returned
from fedsplit.trunk.work_counts import WorkCount

MAX_NUMBER = 2**53
"""The largest number of a reply; a float holds every whole number up to it."""
MAX_LOSS = 1e4
"""The largest loss, in nats per token. A model that guesses has the logarithm of its vocabulary."""
MAX_GROWTH = 1e3
"""The largest value of returned client weights, as a multiple of the largest one that was sent."""
MAX_TOKEN_BYTES = 1024
"""The largest number of bytes of text that one token stands for."""

_TRAFFIC = dict.fromkeys(("bytes-up", "bytes-down"), int)
_TOLD = dict.fromkeys(TOLD_NOTHING, float)
_TRAINING: Mapping[str, type] = {
    WEIGHT: int,
    "loss": float,
    "seconds": float,
    **dict.fromkeys(("steps", "repeated", "refused", "skipped", "peak-bytes"), int),
    **dict.fromkeys(("done", "own-data"), int),
    **_TRAFFIC,
    **_TOLD,
}
_EVALUATION: Mapping[str, type] = {
    WEIGHT: int,
    **dict.fromkeys(("loss", "bits-per-byte", "nats"), float),
    "bytes": int,
    **dict.fromkeys(COUNTS, int),
    **_TRAFFIC,
    **_TOLD,
}

Numbers = dict[str, int | float]


def peer_text(text: str | None) -> str:
    """Return a text of a peer as one line of at most 500 characters, also if it gave none."""
    return errors.peer_text(text or "no reason was given")


def content_of(reply: Message) -> RecordDict:
    """Return the content of a reply without an error.

    Raises:
        ProtocolError: It has none.
    """
    if not reply.has_content():
        raise ProtocolError("its reply has neither content nor an error")
    return reply.content


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A client's answer to `Hello`: its name, and the fingerprint and settings of its run.

    `client` is empty if the server has to assign a name. `settings` is empty if the fingerprint is
    the server's. `states` are the ids of the states that the client can continue from; None if it
    has no checkpoints.
    """

    client: str
    config: str
    settings: Mapping[str, str]
    states: frozenset[int] | None


def identity_of(content: RecordDict, clients: Collection[str]) -> Identity:
    """Read a client's answer to `Hello`.

    Args:
        content: The content of the reply.
        clients: The names that a client of the run can have.

    Raises:
        ProtocolError: The content is not such an answer, or has another name.
    """
    hello = content.config_records.get("hello", ConfigRecord())
    client, config = hello.get("client"), hello.get("config")
    if not isinstance(client, str) or not isinstance(config, str):
        raise ProtocolError(
            "its first reply has no text 'client' and 'config'; run the same code at both sides"
        )
    if client and client not in clients:
        raise ProtocolError(
            f"its first reply has the name {peer_text(client)!r}, which no client of this run has; "
            "run the same code at both sides"
        )
    settings = content.config_records.get("settings", ConfigRecord())
    states = hello.get("states")
    if not (states is None or isinstance(states, list)):
        raise ProtocolError(
            f"its first reply has {peer_text(repr(states))} as states, which must be a list; run "
            "the same code at both sides"
        )
    return Identity(
        client=client,
        config=config,
        settings={name: str(value) for name, value in settings.items()},
        states=None if states is None else frozenset(s for s in states if isinstance(s, int)),
    )


def training_content(
    content: RecordDict,
    *,
    sent: ArrayRecord,
    codec: str,
    work: WorkCount,
    is_stepped: bool,
    client: str,
) -> RecordDict:
    """Return the checked content of a reply to training.

    Args:
        content: The content of the reply.
        sent: The client weights that were sent, as the client decoded them.
        codec: The `RunSpec.client_weights_codec` of the returned ones.
        work: The client's work at the trunk since they were sent.
        is_stepped: Whether the trunk steps with its clients. It then counts their tokens, and its
            count is the weight of the reply. Otherwise the client's count is the weight, which the
            positions of its forwards bound.
        client: The client's name.

    Raises:
        FedsplitError: The content cannot be used; the text says why.
    """
    _require_records(content, {METRICS, ARRAYS} if sent else {METRICS})
    numbers = _numbers(content, _TRAINING)
    _require_most(numbers, "loss", MAX_LOSS)
    _require_most(numbers, "steps", work.steps if is_stepped else work.positions)
    _require_most(numbers, WEIGHT, work.tokens if is_stepped else work.positions)
    if is_stepped:
        numbers[WEIGHT] = work.tokens
    checked = RecordDict({METRICS: MetricRecord(numbers)})  # type: ignore[arg-type]
    if sent:
        found = content.array_records[ARRAYS]
        is_readable = not is_sealed(sent)
        checked[ARRAYS] = (
            _arrays(found, sent, codec) if is_readable else returned(found, sent, client)
        )
    return checked


def evaluation_content(content: RecordDict, *, work: WorkCount) -> RecordDict:
    """Return the checked content of a reply to evaluation.

    Args:
        content: The content of the reply.
        work: The client's work at the trunk since it was asked.

    Raises:
        ProtocolError: The content cannot be used; the text says why.
    """
    _require_records(content, {METRICS})
    numbers = _numbers(content, _EVALUATION)
    _require_most(numbers, WEIGHT, work.positions)
    _require_most(numbers, "loss", MAX_LOSS)
    _require_most(numbers, "nats", MAX_LOSS * numbers[WEIGHT])
    _require_most(numbers, "bytes", MAX_TOKEN_BYTES * work.positions)
    for name in COUNTS:
        _require_most(numbers, name, numbers[WEIGHT])
    return RecordDict({METRICS: MetricRecord(numbers)})  # type: ignore[arg-type]


def _require_records(content: RecordDict, names: Set[str]) -> None:
    if odd := sorted(content.keys() ^ names):
        raise ProtocolError(
            f"its reply has {len(content)} records, not {len(names)}; the first difference is "
            f"{odd[0]!r}; run the same code at both sides"
        )
    typed = {METRICS} & content.metric_records.keys() | {ARRAYS} & content.array_records.keys()
    if typed != names:
        raise ProtocolError(
            f"its reply has records of other types than a MetricRecord {METRICS!r} and an "
            f"ArrayRecord {ARRAYS!r}; run the same code at both sides"
        )


def _numbers(content: RecordDict, kinds: Mapping[str, type]) -> Numbers:
    found = content.metric_records[METRICS]
    if odd := sorted(found.keys() ^ kinds.keys()):
        raise ProtocolError(
            f"its reply has {len(found)} numbers, not {len(kinds)}; the first difference is "
            f"{odd[0]!r}; run the same code at both sides"
        )
    numbers: Numbers = {}
    for name, kind in kinds.items():
        value = found[name]
        if isinstance(value, list):
            raise ProtocolError(f"its reply has a list as {name}, which must be one number")
        # A comparison with NaN is false, so NaN is refused here too.
        if not isinstance(value, int | kind) or not 0 <= value <= MAX_NUMBER:
            whole = "a whole number" if kind is int else "a number"
            raise ProtocolError(
                f"its reply has {value!r} as {name}, which must be {whole} from 0 to {MAX_NUMBER}"
            )
        numbers[name] = value
    return numbers


def _require_most(numbers: Numbers, name: str, most: float) -> None:
    if numbers[name] > most:
        raise ProtocolError(
            f"its reply has {name}={numbers[name]}, but after its work at the trunk at most {most} "
            "is possible"
        )


def _arrays(found: ArrayRecord, sent: ArrayRecord, codec: str) -> ArrayRecord:
    arrays = unpacked(found, codec, shapes_of(sent))
    if odd := sorted(arrays.keys() ^ sent.keys()):
        raise ModelMismatch(
            f"its reply has {len(arrays)} arrays, not the {len(sent)} that were sent; the first "
            f"difference is {odd[0]!r}"
        )
    largest = max(_largest(values_of(array)) for array in sent.values())
    most = MAX_GROWTH * max(1.0, largest)
    # In the order that was sent; the order of a sum of floats changes its result.
    return ArrayRecord({n: _array(n, arrays[n], like, most) for n, like in sent.items()})


def _array(name: str, array: Array, like: Array, most: float) -> Array:
    if (array.dtype, tuple(array.shape)) != (like.dtype, tuple(like.shape)):
        raise ModelMismatch(
            f"its reply has {name} as {array.dtype} of shape {tuple(array.shape)}, but "
            f"{like.dtype} of shape {tuple(like.shape)} was sent"
        )
    values = values_of(array)
    largest = _largest(values)
    # NaN and Inf are not at most anything.
    if not largest <= most:
        if not np.isfinite(values).all():
            raise NonFinite(f"its reply has NaN or Inf in {name}")
        raise BadTensor(
            f"its reply has a value of {largest:.3g} in {name}, but at most {most:.3g} is "
            f"{MAX_GROWTH:g} times the largest value that was sent"
        )
    # Made anew: Flower reads the header of an array, which a peer wrote, as Python source.
    return Array(values)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0))
