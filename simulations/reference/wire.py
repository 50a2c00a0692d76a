"""The page of the wire protocol: its schema, messages and the table of a session's states."""

import inspect
import re

from fedsplit.wire import messages
from fedsplit.wire.session import TABLE
from simulations.reference import ROOT, table

_SCHEMA = ROOT / "fedsplit" / "transport" / "fedsplit.proto"
_HEAD = f"""# The wire protocol

A client and its trunk speak version {messages.PROTOCOL} of this protocol over gRPC.
Both sides need the same version. A test compares the bytes of every message with those of a file.

This page is made of [the schema](../../fedsplit/transport/fedsplit.proto),
`fedsplit/wire/messages.py` and `fedsplit/wire/session.py` by
`python -m simulations.reference --write`."""
_SESSION = """## States of a session

A session counts its calls. Its state is the number of the last call, the calls whose backward is
outstanding, and the number of backwards since the last step. A request that the state does not
allow gets the error [PROTOCOL](errors.md#protocol) and changes nothing. A request that is repeated
gets the reply of the first time, and does not reach this table."""


def page() -> str:
    """Return the page: frames and calls, messages, and the table of states."""
    schema = _SCHEMA.read_text(encoding="utf-8")
    states = table(
        ["event", "needs", "then"],
        [[event.value, rule.needs, rule.effect] for event, rule in TABLE.items()],
    )
    sections = [_HEAD, _frames(schema), _messages(), f"{_SESSION}\n\n{states}"]
    return "\n\n".join(sections) + "\n"


def _frames(schema: str) -> str:
    """Return the comment at the top of the schema, and its calls."""
    comment = schema.partition("syntax =")[0]
    text = re.sub(r"^// ?", "", comment, flags=re.MULTILINE).strip()
    calls = re.search(r"^service .*?^\}", schema, re.MULTILINE | re.DOTALL)
    assert calls, "the schema has a service"
    return f"## Frames and calls\n\n{text}\n\n```text\n{calls[0]}\n```"


def _messages() -> str:
    """Return a table of all requests and replies, with the beginnings of their docstrings."""
    kinds = [cls for cls in vars(messages).values() if inspect.isclass(cls)]
    rows = [
        [f"`{cls.__name__}`", " ".join(str(inspect.getdoc(cls)).partition("\n\n")[0].split())]
        for cls in kinds
        if issubclass(cls, (messages.Request, messages.Reply))
        and cls not in (messages.Request, messages.Reply)
    ]
    text = (
        "A request is named by its session, its call and its kind, and a retry has the same name."
    )
    return f"## Messages\n\n{text}\n\n{table(['message', 'what it is'], rows)}"
