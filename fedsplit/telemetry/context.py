"""What a thread works on: fields, such as the client and the step, of its log lines and spans."""

from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import MappingProxyType

_FIELDS: ContextVar[Mapping[str, object]] = ContextVar("fields", default=MappingProxyType({}))

_SESSION_DIGITS = 8
"""The digits of a session's name that are shown; who has all of them can speak for the session."""


class working_on:  # noqa: N801  # used as a function
    """A context whose log lines and spans have these fields, besides those that are set already.

    Of a `session`, only the first digits are kept.
    """

    __slots__ = ("_fields", "_token")

    _token: Token[Mapping[str, object]]

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        self._token = _FIELDS.set({**_FIELDS.get(), **shown(self._fields)})

    def __exit__(self, *_: object) -> None:
        _FIELDS.reset(self._token)


def current_fields() -> Mapping[str, object]:
    """Return the fields of the calling thread."""
    return _FIELDS.get()


def shown(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields that have a value, with the first digits of a session.

    >>> shown({"call": 3, "client": "", "session": "0123456789abcdef"})
    {'call': 3, 'session': '01234567'}
    """
    kept = {name: value for name, value in fields.items() if value not in ("", None)}
    if "session" in kept:
        kept["session"] = str(kept["session"])[:_SESSION_DIGITS]
    return kept
