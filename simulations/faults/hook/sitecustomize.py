"""Reports to the harness of faults when this process is at a point, and waits for its answer.

Python imports this module at the start of each process that finds its folder on PYTHONPATH. It
does nothing without the variable `FEDSPLIT_FAULTS`, which names the folder of a `Watcher`. It
imports the standard library alone, because it runs before all other code.
"""

import functools
import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VARIABLE = "FEDSPLIT_FAULTS"
POINTS, SOCKET = "points.json", "socket"


def install(folder: str) -> None:
    """Wrap the functions of all points, now or when their modules are imported."""
    with open(os.path.join(folder, POINTS), encoding="utf-8") as file:
        points = json.load(file)
    by_module: dict[str, list[dict[str, str]]] = {}
    for point in points:
        by_module.setdefault(point["module"], []).append(point)
    for name, found in by_module.items():
        # A process that was forked has imported it already.
        if name in sys.modules:
            _wrap_all(sys.modules[name], found, folder)
    sys.meta_path.insert(0, _Finder(by_module, folder))


class _Finder(MetaPathFinder):
    """Finds the modules of points as the other finders do, and wraps their functions."""

    def __init__(self, by_module: dict[str, list[dict[str, str]]], folder: str) -> None:
        self._by_module = dict(by_module)
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        points = self._by_module.pop(fullname, None)
        if points is None:
            return None
        # It does not find itself again, because the name is no longer in its table.
        spec = importlib.util.find_spec(fullname)
        if spec and spec.loader:
            _wrap_after(spec.loader, points, self._folder)
        return spec


def _wrap_after(loader: Loader, points: list[dict[str, str]], folder: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _wrap_all(module, points, folder)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _wrap_all(module: ModuleType, points: list[dict[str, str]], folder: str) -> None:
    for point in points:
        *owners, name = point["function"].split(".")
        owner: Any = module
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, _wrapped(getattr(owner, name), point, folder))


def _wrapped(function: Callable[..., Any], point: dict[str, str], folder: str) -> Any:
    pattern, is_before = re.compile(point["argument"]), point["when"] == "before"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_meant = not pattern.pattern or bool(args and pattern.search(str(args[0])))
        if is_meant and is_before:
            _report(point["name"], folder)
        result = function(*args, **kwargs)
        if is_meant and not is_before:
            _report(point["name"], folder)
        return result

    return call


def _report(name: str, folder: str) -> None:
    """Tell the harness, and wait until it closes the connection; it kills victims before that."""
    message = json.dumps({"point": name, "pid": os.getpid()}).encode()
    # A harness that is gone lets everything go on.
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, SOCKET))
        connection.sendall(message + b"\n")
        connection.recv(1)


if VARIABLE in os.environ:
    install(os.environ[VARIABLE])
