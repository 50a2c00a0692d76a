"""The public names: few, documented, and there."""

import inspect
from collections.abc import Iterator

import pytest

import fedsplit
from tests.house.source import require_none


def test_public_names_are_few_and_sorted():
    assert len(fedsplit.__all__) <= 16
    assert list(fedsplit.__all__) == sorted(fedsplit.__all__)


def undocumented() -> Iterator[str]:
    for name in fedsplit.__all__:
        public = getattr(fedsplit, name)
        if not inspect.getdoc(public):
            yield f"fedsplit.{name}"
        for attribute, value in vars(public).items() if inspect.isclass(public) else ():
            is_public = inspect.isfunction(value) and not attribute.startswith("_")
            if is_public and not inspect.getdoc(value):
                yield f"fedsplit.{name}.{attribute}"


def test_public_names_are_there_and_documented():
    require_none(undocumented(), "write a docstring")


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no public name 'Nothing'"):
        _ = fedsplit.Nothing
