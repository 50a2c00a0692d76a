"""The product's source files, as the house tests read them, and how a broken rule is reported."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedsplit", "strategies", "simulations")
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
    if "_pb2" not in file.name
)


DOORS = (
    "audit",
    "transport",
    "config",
    "flower",
    "__main__",
    "cli",
    "openai",
    "certs",
    "doctor",
    "serve",
    "runs",
    "console",
)
CORE = [
    file
    for file in FILES
    if file.startswith("fedsplit/") and Path(file).parts[1].removesuffix(".py") not in DOORS
]


@cache
def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(text(file))


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def require_none(offenders: Iterable[str], remedy: str) -> None:
    """Fail with every offender ("file:line: what is wrong") and with what to do about them.

    Raises:
        AssertionError: There is an offender.
    """
    found = list(offenders)
    assert not found, "\n".join([f"{len(found)} found; {remedy}", *found])
