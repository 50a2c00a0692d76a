"""The public names: few, documented, and there."""

import inspect

import pytest

import fedsplit


def test_public_names_are_few_and_sorted():
    assert len(fedsplit.__all__) <= 16
    assert list(fedsplit.__all__) == sorted(fedsplit.__all__)


@pytest.mark.parametrize("name", fedsplit.__all__)
def test_a_public_name_is_there_and_documented(name):
    public = getattr(fedsplit, name)
    assert inspect.getdoc(public)
    for attribute, value in vars(public).items() if inspect.isclass(public) else ():
        if inspect.isfunction(value) and not attribute.startswith("_"):
            assert inspect.getdoc(value), f"{name}.{attribute}"


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no public name 'Nothing'"):
        _ = fedsplit.Nothing
