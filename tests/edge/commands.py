"""The installed `fedsplit` command, as the tests start it."""

import sys
import tomllib

from tests.house.source import ROOT

_SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["fedsplit"]
MODULE, FUNCTION = _SCRIPT.split(":")
# What an installed console script does.
CODE = f"import sys; from {MODULE} import {FUNCTION}; sys.exit({FUNCTION}())"
COMMAND = [sys.executable, "-c", CODE]
