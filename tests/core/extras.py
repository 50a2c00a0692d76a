"""Marks for tests that need an optional library."""

import importlib.util

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra"
)
