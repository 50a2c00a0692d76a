"""The values of Flower's arrays: read as NumPy reads them, or refused, and never parsed."""

import ast

import numpy as np
import pytest
from flwr.app import Array

from fedsplit.errors import BadTensor
from fedsplit.flower.npy import tensor_of, values_of

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "every second": np.arange(10)[::2],
    "scalar": np.array(3.0, dtype=np.float16),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "bools": np.array([True, False]),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_values_are_those_that_numpy_reads(case):
    array = Array(ARRAYS[case])
    values = values_of(array)
    assert values.dtype == array.numpy().dtype
    np.testing.assert_array_equal(values, array.numpy())


def test_values_are_a_copy():
    array = Array(ARRAYS["matrix"])
    tensor_of(array).zero_()
    values_of(array).fill(0)
    np.testing.assert_array_equal(array.numpy(), ARRAYS["matrix"])


def test_no_array_is_parsed_as_python(monkeypatch):
    # CPython 3.11 may fail if two threads parse at a time; see the module.
    parsed = []
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: parsed.append(args))
    for values in ARRAYS.values():
        values_of(Array(values))
    assert parsed == []


GOOD = Array(ARRAYS["matrix"])
WRONG = {
    "shorter": Array("float32", (2, 3), "numpy.ndarray", GOOD.data[:-1]),
    "longer": Array("float32", (2, 3), "numpy.ndarray", GOOD.data + b"0"),
    "another shape": Array("float32", (3, 2), "numpy.ndarray", GOOD.data),
    "another dtype": Array("int32", (2, 3), "numpy.ndarray", GOOD.data),
    "no dtype": Array("float33", (2, 3), "numpy.ndarray", GOOD.data),
    "big-endian": Array(np.array([1.0, 2.0], dtype=">f8")),
    "complex": Array(np.array([1j])),
    "text": Array(np.array(["abcd"])),
    "dates": Array(np.array([0], dtype="M8[s]")),
    "a structure": Array(np.zeros(2, dtype="f4,i4")),
    "a dtype beyond memory": Array("(2**60,)f4", (1,), "numpy.ndarray", GOOD.data),
    "too many dimensions": Array("float32", (1,) * 70, "numpy.ndarray", GOOD.data),
    "objects": Array("object", (1,), "numpy.ndarray", GOOD.data),
    "no file": Array("float32", (2, 3), "numpy.ndarray", b"nonsense"),
    "nothing": Array("float32", (2, 3), "numpy.ndarray", b""),
    "a negative shape": Array("float32", (-2, -3), "numpy.ndarray", GOOD.data),
    "a huge shape": Array("float32", (2**62, 2**62), "numpy.ndarray", GOOD.data),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_bytes_are_refused(case):
    with pytest.raises(BadTensor, match=r"are not its \.npy file"):
        values_of(WRONG[case])
