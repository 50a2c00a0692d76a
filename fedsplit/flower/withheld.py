"""The errors of a client's machine, without what only that machine may know."""

from collections.abc import Iterator
from contextlib import contextmanager

from fedsplit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FedsplitError,
    Internal,
    PrivacyBudget,
    StorageError,
)
from fedsplit.flower.node import Node

_LOCAL = (DataError, StorageError, CheckpointError, ConfigError, PrivacyBudget)
"""Errors that may contain paths, settings and text of the machine that raises them."""


@contextmanager
def withholding(node: Node) -> Iterator[None]:
    """A context of a client's work whose errors tell the server no more than their kind.

    Flower sends the text of an error to the server. The errors of data, files and other libraries
    have paths of this machine and lines of its data in it; those of the trunk pass as they are.
    The log of the SuperNode has the whole error. A machine that trusts runs withholds nothing.
    """
    try:
        yield
    except FedsplitError as exc:
        if node.trusts_runs or not isinstance(exc, _LOCAL):
            raise
        raise type(exc)(_text(node, exc)) from exc
    except Exception as exc:
        if node.trusts_runs:
            raise
        raise Internal(_text(node, exc)) from exc


def _text(node: Node, exc: Exception) -> str:
    return (
        f"{node.name or 'a client'} stopped with {type(exc).__name__}; the log of its SuperNode "
        "has the text, which may not leave its machine"
    )
