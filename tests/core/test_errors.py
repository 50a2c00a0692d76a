"""Codes are what peers decide on: they are unique, complete, and survive the wire."""

import re

import pytest

from fedsplit import errors
from fedsplit.errors import FedsplitError, Internal, error_from_code

CHILDREN = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, FedsplitError) and cls is not FedsplitError
]
GRPC_STATUS = set(
    "INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND PERMISSION_DENIED RESOURCE_EXHAUSTED "
    "FAILED_PRECONDITION ABORTED UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS "
    "UNAUTHENTICATED".split()
)


def name(cls: type[FedsplitError]) -> str:
    return cls.__name__


def test_codes_are_unique():
    codes = [cls.code for cls in CHILDREN]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("cls", CHILDREN, ids=name)
def test_every_error_says_its_code_its_status_and_what_it_means(cls):
    assert re.fullmatch(r"[A-Z_]+", cls.code)
    assert cls.status in GRPC_STATUS
    assert cls.__doc__ and cls.__doc__ != FedsplitError.__doc__


@pytest.mark.parametrize("cls", CHILDREN, ids=name)
def test_code_gives_the_same_error_back(cls):
    error = error_from_code(cls.code, "what was wrong", retry_after_s=1.5)
    assert type(error) is cls
    assert (str(error), error.retry_after_s) == ("what was wrong", 1.5)


@pytest.mark.parametrize("code", ["", "FROM_THE_FUTURE", "internal", "conn_lost"])
def test_an_unknown_code_is_an_internal_error_that_no_retry_helps(code):
    error = error_from_code(code, "?")
    assert type(error) is Internal
    assert not error.retryable


def test_only_what_may_pass_by_itself_is_retryable():
    assert {cls.__name__ for cls in CHILDREN if cls.retryable} == {
        "ConnectionLost",
        "DeadlineExceeded",
        "Draining",
        "Overloaded",
    }


@pytest.mark.parametrize("cls", [errors.ConfigError, errors.UnsupportedModel, errors.DataError])
def test_what_a_user_asked_wrongly_is_a_value_error_too(cls):
    with pytest.raises(ValueError, match="no"):
        raise cls("no")
