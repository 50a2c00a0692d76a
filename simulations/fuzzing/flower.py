"""Cases for the readers of Flower's messages: replies of clients, and weights of a server."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsplit.client.seal import Seal, SealedWeights
from fedsplit.errors import FedsplitError
from fedsplit.flower.client_arrays import packed, shapes_of, unpacked
from fedsplit.flower.npy import values_of
from fedsplit.flower.records import ARRAYS, METRICS, TOLD_NOTHING, WEIGHT, load_arrays
from fedsplit.flower.reply import evaluation_content, identity_of, training_content
from fedsplit.flower.sealed_arrays import record_of
from fedsplit.trunk.work_counts import WorkCount
from simulations.fuzzing import odd
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.stage import Stage

_TENSORS = {"w": torch.ones(2, 3), "b": torch.zeros(3), "s": torch.tensor(0.5)}
_SENT = ArrayRecord(_TENSORS)
_WORK = WorkCount(steps=2, tokens=30, positions=40)
_COMMON = {WEIGHT: 30, "loss": 2.5, "bytes-up": 10, "bytes-down": 20, **TOLD_NOTHING}
_TRAINED = {
    **_COMMON,
    **{"steps": 2, "repeated": 0, "refused": 0, "skipped": 0},
    **{"seconds": 1.5, "peak-bytes": 1000, "done": 0, "own-data": 0},
}
_EVALUATED = {**_COMMON, "bits-per-byte": 1.5, "nats": 75.0, "bytes": 70, "correct": 0}
_CODECS = ("none", "fp16", "int8", "sealed")
_NOBODYS = record_of(SealedWeights.none({"w": (2, 3), "b": (3,)}, 3))
_SEALED = record_of(
    Seal(bytes(32)).sealed({"w": torch.ones(2, 3), "b": torch.zeros(3)}, 1, 3, client=1, clients=3)
)
_DTYPES = ("float32", "float16", "float64", "int64", "bool", "uint8", "object", "<f4", "O", "V8")
_RECORDS = (MetricRecord, ConfigRecord, ArrayRecord)


def flower_case(case: Case, stage: Stage) -> None:
    """A client's reply, or a server's weights, of which one part is odd."""
    case.rng.choice(_KINDS)(case)


def _training(case: Case) -> None:
    rng, codec = case.rng, case.rng.choice(_CODECS)
    content = RecordDict({METRICS: MetricRecord(_numbers(rng, _TRAINED))})
    sent = _NOBODYS if codec == "sealed" else _SENT
    content[ARRAYS] = _arrays(rng, _SEALED if codec == "sealed" else packed(_SENT, codec))
    content = _records(rng, content)
    is_stepped = rng.random() < 0.5

    def read() -> RecordDict:
        return training_content(
            content, sent=sent, codec=codec, work=_WORK, is_stepped=is_stepped, client="client-1"
        )

    checked = _read(case, content, read)
    if checked is not None:
        _require_plain(checked, sent)


def _evaluation(case: Case) -> None:
    rng = case.rng
    content = RecordDict({METRICS: MetricRecord(_numbers(rng, _EVALUATED))})
    content = _records(rng, content)
    _read(case, content, lambda: evaluation_content(content, work=_WORK))


def _hello(case: Case) -> None:
    kinds = (str, int, list[str], bytes)
    fields: dict[str, Any] = {"client": "client-0", "config": "f"}
    settings: dict[str, Any] = {"train.lr": "1"}
    if case.rng.random() < 0.5:
        fields = odd.changed(case.rng, fields, kinds)
    else:
        settings = odd.changed(case.rng, settings, kinds)
    content = RecordDict({"hello": ConfigRecord(fields), "settings": ConfigRecord(settings)})
    content = _records(case.rng, content)
    _read(case, content, lambda: identity_of(content, ["client-0", "client-1"]))


def _weights(case: Case) -> None:
    rng, codec = case.rng, case.rng.choice(_CODECS)
    arrays = _arrays(rng, packed(_SENT, codec))
    into = {name: tensor.clone() for name, tensor in _TENSORS.items()}
    _read(case, arrays, lambda: load_arrays(into, unpacked(arrays, codec, shapes_of(_SENT))))


_KINDS: tuple[Callable[[Case], None], ...] = (_training, _training, _evaluation, _hello, _weights)


def _read(case: Case, sent: Any, read: Callable[[], Any]) -> Any:
    case.sent(sent)
    try:
        result = read()
    except FedsplitError as error:
        case.got(error)
        return None
    case.got(result)
    return result


def _require_plain(checked: RecordDict, sent: ArrayRecord) -> None:
    for name, array in checked.array_records[ARRAYS].items():
        values = values_of(array)
        like = values_of(sent[name])
        if values.shape != like.shape or values.dtype != like.dtype or not _is_bounded(values):
            raise Wrong(f"{name} of a reply was accepted as {values!r}")


def _is_bounded(values: Any) -> bool:
    # What is sealed may be any number.
    return values.dtype == np.uint32 or bool((abs(values) <= 1e3).all())


def _numbers(rng: random.Random, honest: dict[str, Any]) -> dict[str, Any]:
    changes = odd.changed(rng, honest, (int, float, list[float]))
    return changes if rng.random() < 0.5 else honest


def _arrays(rng: random.Random, honest: ArrayRecord) -> ArrayRecord:
    arrays = dict(honest)
    name = rng.choice(list(arrays))
    match rng.randrange(6):
        case 0:
            del arrays[name]
        case 1:
            arrays[odd.text(rng)] = arrays[name]
        case 2 | 3:
            arrays[name] = _array(rng, arrays[name])
    return ArrayRecord(arrays)


def _array(rng: random.Random, honest: Array) -> Array:
    shape, dtype, data, stype = tuple(honest.shape), honest.dtype, honest.data, honest.stype
    match rng.randrange(6):
        case 0:
            data = odd.damaged(rng, data)
        case 1:
            dtype = rng.choice(_DTYPES)
        case 2:
            shape = tuple(odd.signed(rng) for _ in range(rng.choice((0, 1, 2, 40))))
        case 3:
            stype = odd.text(rng)
        case _:
            like = torch.from_numpy(values_of(honest))
            tensor = odd.tensor(rng, like if like.dim() else like[None])
            return Array(tensor.float().numpy() if rng.random() < 0.5 else _as_numpy(tensor))
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def _as_numpy(tensor: torch.Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _records(rng: random.Random, honest: RecordDict) -> RecordDict:
    records = dict(honest)
    name = rng.choice(list(records))
    match rng.randrange(12):
        case 0:
            del records[name]
        case 1:
            records[odd.text(rng)] = records[name]
        case 2:
            records[name] = rng.choice(_RECORDS)()
    return RecordDict(records)
