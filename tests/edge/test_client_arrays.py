"""The client weights in Flower's arrays: what arrives, what is averaged, and what is refused."""

import math

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedsplit.config import compose
from fedsplit.errors import BadTensor, ConfigError, Diverged, ModelMismatch
from fedsplit.flower.client_arrays import packed, shapes_of, unpacked
from fedsplit.flower.records import ARRAYS, METRICS, WEIGHT, num_bytes, to_arrays
from fedsplit.runs.checkpoint import checkpoints_in
from fedsplit.wire.codec import as_received
from tests.edge.federation import (
    SGD,
    client_that,
    federate,
    joined,
    largest_difference,
    metrics_lines,
    spec_for,
)

CODECS = ("fp16", "int8")


@given(st.lists(st.integers(1, 5), max_size=4), st.sampled_from(CODECS), st.integers(0, 9))
def test_client_weights_lose_what_the_wires_codec_loses(shape, codec, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    arrays = to_arrays({"weight": tensor})
    came = unpacked(packed(arrays, codec), codec, {"weight": tuple(shape)})
    wanted = as_received(tensor if shape else tensor.view(1), codec).view(shape)
    assert torch.equal(came.to_torch_state_dict()["weight"], wanted)
    assert shapes_of(came) == {"weight": tuple(shape)}


@pytest.mark.parametrize(("codec", "ratio"), [("none", 1.0), ("fp16", 0.5), ("int8", 0.254)])
def test_what_they_take(codec, ratio):
    arrays = to_arrays({"weight": torch.randn(512, 128), "bias": torch.randn(512)})
    assert num_bytes(packed(arrays, codec)) == pytest.approx(ratio * num_bytes(arrays), rel=0.01)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_stays_so(codec):
    rows = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    came = unpacked(packed(to_arrays({"w": rows}), codec), codec, {"w": (2, 2)})
    assert came.to_torch_state_dict()["w"].isfinite().all(dim=1).tolist() == [False, True]


BYTES = torch.zeros(3, 7, dtype=torch.uint8)
WRONG = {
    "name": (
        {"bias": BYTES},
        ModelMismatch,
        "1 arrays of .* arrived, not 1; the first difference is 'bi",
    ),
    "not compressed": (
        {"w": torch.zeros(3, 5)},
        BadTensor,
        "w arrived as float32 of shape .3, 5., wh",
    ),
    "rows": ({"w": BYTES[:2]}, BadTensor, "which is not the int8 encoding of shape .3, 5."),
    "rank": (
        {"w": BYTES.view(3, 7, 1)},
        BadTensor,
        "which is not the int8 encoding of shape .3, 5.",
    ),
    "length": ({"w": BYTES[:, :6]}, BadTensor, "a row of 5 values takes 7 bytes, not 6"),
}


@pytest.mark.parametrize(("arrays", "error", "text"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(arrays, error, text):
    with pytest.raises(error, match=text):
        unpacked(ArrayRecord(arrays), "int8", {"w": (3, 5)})


@pytest.mark.parametrize("words", [("client_weights=personal",), ("baseline=local",)], ids=str)
def test_client_weights_that_do_not_travel_cannot_be_compressed(words):
    with pytest.raises(ConfigError, match="wire.client_weights=int8 has nothing to compress"):
        compose([*words, "wire.client_weights=int8"])


def test_how_they_travel_decides_numbers():
    prints = {compose([f"wire.client_weights={codec}"]).fingerprint for codec in ("none", *CODECS)}
    assert len(prints) == 3


# --- a federation -------------------------------------------------------------------------------


def noted(run, **options):
    """The run's folder, and the client weights that went out and came back in each round."""
    seen = []

    def train(message, context, go_on):
        reply = go_on()
        came, went = (each.content.array_records[ARRAYS] for each in (message, reply))
        seen.append((came, went, reply.content.metric_records[METRICS][WEIGHT]))
        return reply

    return federate(run, client_that(train=train)), seen


@pytest.mark.parametrize("words", [(), ("lora=on", "lora.rank=2")], ids=["full", "lora"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_averaged_is_what_was_received(tmp_path, codec, words):
    run = spec_for(tmp_path, *SGD, *words, "train.save_every=1", f"wire.client_weights={codec}")
    folder, seen = noted(run)
    after = load_file(checkpoints_in(folder.checkpoints)[1] / "client_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in after.items()}
    total = sum(weight for _, _, weight in seen)
    for _, came, weight in seen:
        assert {array.dtype for array in came.values()} == {"uint8"}
        for name, tensor in unpacked(came, codec, shapes).to_torch_state_dict().items():
            after[name] -= weight / total * tensor
    assert len(seen) == 3
    assert max(left.abs().max().item() for left in after.values()) < 1e-6


def test_a_personal_part_stays_exact(tmp_path):
    run = spec_for(tmp_path, "client_weights=personal_bottom", "wire.client_weights=int8")
    _, seen = noted(run)
    names = set(seen[0][0].keys())
    assert names and not any("wte" in name or ".h.0." in name for name in names)


def test_a_client_whose_bytes_are_wrong_has_failed(tmp_path):
    def train(message, context, go_on):
        reply = go_on()
        arrays = dict(reply.content.array_records[ARRAYS])
        name = min(arrays)
        arrays[name] = Array(arrays[name].numpy()[..., :-1])
        reply.content = RecordDict({**reply.content, ARRAYS: ArrayRecord(arrays)})
        return reply

    run = spec_for(tmp_path, "wire.client_weights=int8")
    with pytest.raises(Diverged, match="none of 3 clients finished; the first said: a row of"):
        federate(run, client_that(train=train))


@pytest.mark.slow
def test_fewer_bytes_travel_and_the_model_is_near_that_of_exact_weights(tmp_path):
    folders = {
        codec: federate(spec_for(tmp_path / codec, *SGD, f"wire.client_weights={codec}"))
        for codec in ("none", *CODECS)
    }
    carried = {
        codec: metrics_lines(each)[0]["client_weights_bytes"] for codec, each in folders.items()
    }
    plain = carried["none"]
    assert 0.25 * plain < carried["int8"] < 0.5 * plain < carried["fp16"] < 0.7 * plain
    exact = joined(folders["none"])
    assert 0 < largest_difference(exact, joined(folders["fp16"])) < 1e-3
    assert 0 < largest_difference(exact, joined(folders["int8"])) < 2e-2
