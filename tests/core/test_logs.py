"""The log: one tree, as text or JSON, with the fields of its thread."""

import json
import logging
import os
import subprocess
import sys

import pytest

from fedsplit.console import begin_log
from fedsplit.errors import ConfigError, StaleVersion
from fedsplit.telemetry.context import working_on
from fedsplit.telemetry.logs import TREE
from tests.house.source import ROOT

LOG = logging.getLogger("fedsplit.trunk.engine")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("FEDSPLIT_LOG_FORMAT", raising=False)
    monkeypatch.delenv("FEDSPLIT_LOG_LEVEL", raising=False)
    TREE.handlers = []
    return monkeypatch


def test_a_line_of_json_has_the_fields_of_elastic_and_those_of_its_thread(_environment, capsys):
    _environment.setenv("FEDSPLIT_LOG_FORMAT", "json")
    begin_log("info")
    with working_on(run="r", client="client-0", session="0123456789abcdef", call=3, step=7):
        LOG.warning("late by %d: %s", 2, StaleVersion("moved on"))
    LOG.debug("not at this level")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["message"] == "late by 2: moved on" and told["log.level"] == "warning"
    assert told["ecs.version"] and told["@timestamp"].endswith("Z")
    assert told["log"]["logger"] == "fedsplit.trunk.engine"
    assert told["error"] == {"code": StaleVersion.code} and told["service"] == {"name": "fedsplit"}
    fields = {"run": "r", "client": "client-0", "session": "01234567", "call": 3, "step": 7}
    assert told["fedsplit"] == fields


def test_an_exception_is_in_one_line(_environment, capsys):
    _environment.setenv("FEDSPLIT_LOG_FORMAT", "json")
    begin_log("info")
    try:
        raise ValueError("why") from KeyError("the cause")
    except ValueError:
        LOG.exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    error = json.loads(line)["error"]
    assert (error["type"], error["message"]) == ("ValueError", "why")
    assert "raise ValueError" in error["stack_trace"] and "the cause" in error["stack_trace"]


def test_lines_of_other_libraries_are_json_as_well():
    lines = [
        "import logging, warnings",
        "from fedsplit.console import begin_log",
        "begin_log('info')",
        "logging.getLogger('other').warning('x')",
        "warnings.warn('y')",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "FEDSPLIT_LOG_FORMAT": "json", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["log"]["logger"] for line in told] == ["other", "py.warnings"]
    assert told[0]["message"] == "x" and "UserWarning: y" in told[1]["message"]


@pytest.mark.parametrize(
    ("before", "told"), [("", "INFO: ready\n"), ("logging.basicConfig(level=10)", "INFO:x:ready\n")]
)
def test_text_is_one_line_also_in_a_program_that_has_a_log(before, told):
    # In a process of its own, because pytest adds handlers.
    lines = [
        "import logging",
        before,
        "from fedsplit.console import begin_log",
        "from fedsplit.telemetry.logs import TREE",
    ]
    lines += ["begin_log('error')", "begin_log('error')", "TREE.getChild('x').info('ready')"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "FEDSPLIT_LOG_LEVEL": "info", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.replace("fedsplit.", "") == told


@pytest.mark.parametrize(
    ("option", "variable", "value", "known"),
    [
        ("--log-format", "FEDSPLIT_LOG_FORMAT", "xml", "text, json"),
        ("--log-level", "FEDSPLIT_LOG_LEVEL", "loud", "debug, info"),
    ],
)
def test_what_is_unknown_is_refused(option, variable, value, known, _environment):
    _environment.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        begin_log("info")
    told = f"{option} {value} (or {variable} of the environment) is unknown; use one of: {known}"
    assert str(caught.value).startswith(told)


def test_options_take_precedence_and_reach_other_processes(_environment, capsys):
    _environment.setenv("FEDSPLIT_LOG_FORMAT", "text")
    _environment.setenv("FEDSPLIT_LOG_LEVEL", "error")
    begin_log("warning", form="json", level="info")
    LOG.info("ready")
    assert json.loads(capsys.readouterr().err)["message"] == "ready"
    chosen = [os.environ[f"FEDSPLIT_LOG_{name}"] for name in ("FORMAT", "LEVEL")]
    assert chosen == ["json", "info"]
