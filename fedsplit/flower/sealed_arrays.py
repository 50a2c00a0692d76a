"""Sealed client weights as Flower's arrays, and the check of those that a client returned."""

import re

import numpy as np
from flwr.app import Array, ArrayRecord

from fedsplit.client.seal import NONCES, SealedWeights
from fedsplit.errors import ModelMismatch, ProtocolError
from fedsplit.flower.npy import values_of
from fedsplit.spec import RunSpec


def record_of(weights: SealedWeights) -> ArrayRecord:
    """Return sealed weights as a record of arrays."""
    return ArrayRecord({name: Array(np.asarray(each)) for name, each in weights.arrays.items()})


def sealed_of(record: ArrayRecord) -> SealedWeights:
    """Return the sealed weights of a record that `record_of` made."""
    return SealedWeights.of({name: values_of(array) for name, array in record.items()})


def most_tokens(run: RunSpec) -> int:
    """Return the most tokens that all clients of a run train on in a round.

    Shares of it are known to a client before the others have replied, and all together are at
    most 1.
    """
    train = run.train
    examples = train.local_steps * train.accumulation * train.batch_size
    return run.clients * examples * (run.data.sequence_length if run.task == "causal_lm" else 1)


def is_sealed(record: ArrayRecord) -> bool:
    """Return whether a record is one of sealed weights."""
    return NONCES in record


def returned(found: ArrayRecord, sent: ArrayRecord, client: str) -> ArrayRecord:
    """Return the sealed weights of a client's reply, made anew.

    Args:
        found: The arrays of the reply.
        sent: The arrays that the client was sent.
        client: Its name.

    Raises:
        ModelMismatch: Names, types or shapes are others than those of what was sent.
        ProtocolError: They are not the weights of this client alone.
    """
    if odd := sorted(found.keys() ^ sent.keys()):
        raise ModelMismatch(
            f"its reply has {len(found)} sealed arrays, not the {len(sent)} that were sent; the "
            f"first difference is {odd[0]!r}"
        )
    for name, like in sent.items():
        if (found[name].dtype, tuple(found[name].shape)) != (like.dtype, tuple(like.shape)):
            raise ModelMismatch(
                f"its reply has {name} as {found[name].dtype} of shape {tuple(found[name].shape)}, "
                f"but {like.dtype} of shape {tuple(like.shape)} was sent"
            )
    weights = sealed_of(ArrayRecord({name: found[name] for name in sent}))
    number = re.sub(r"\D", "", client)
    if weights.clients != [int(number)]:
        raise ProtocolError(
            f"its sealed weights have the nonces of the clients {weights.clients}, not its own "
            "alone; run the same code at both sides"
        )
    return record_of(weights)
