"""A pytest plugin that writes the outcome of every test, and the error of a failed one, as JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsplit.errors import FedsplitError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="the file to write")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(Path(config.getoption("--outcomes"))))


class Recorder:
    """Collects outcomes: `passed`, `skipped`, or the class and the first line of the error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._outcomes: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            outcome: dict[str, Any] = {"outcome": report.outcome}
            if report.failed:
                error = call.excinfo.value
                lines = [line for line in str(error).splitlines() if line.strip()]
                outcome |= {
                    "error": type(error).__name__,
                    "refused": is_refusal(error),
                    "text": lines[0].strip() if lines else "",
                }
            self._outcomes[item.nodeid.partition("::")[2]] = outcome
        return report

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(json.dumps(self._outcomes, indent=1), encoding="utf-8")


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is fedsplit's own."""
    while error is not None:
        if isinstance(error, FedsplitError):
            return True
        error = error.__cause__ or error.__context__
    return False
