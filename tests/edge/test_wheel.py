"""The wheel: what it installs, and that it needs nothing of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import ROOT

# The checkout is on the path of the tests' interpreter; this process must not see it.
ALONE = f"""
import sys
from importlib.util import find_spec
sys.path = [place for place in sys.path if place not in ("", {str(ROOT)!r})]
assert not find_spec("conf") and not find_spec("simulations")
from fedsplit.cli import main
print(find_spec("fedsplit").origin, find_spec("strategies").origin, sep="\\n")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel of this checkout was installed to."""
    built, target = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built)]
    subprocess.run([*build, str(ROOT)], check=True, cwd=built)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def alone(installed: Path, *arguments: str, cwd: Path) -> list[str]:
    """The lines that `fedsplit ARGUMENTS` prints, run in a folder where only the wheel is."""
    command = [sys.executable, "-c", ALONE, *arguments]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    pipes = dict(capture_output=True, text=True, timeout=120)
    done = subprocess.run(command, cwd=cwd, env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    package, methods, *lines = done.stdout.splitlines()
    assert package == str(installed / "fedsplit" / "__init__.py")
    assert methods == str(installed / "strategies" / "__init__.py")
    return lines


def test_the_wheel_installs_two_packages(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"fedsplit", "strategies", "bin"}
    assert (installed / "fedsplit" / "conf" / "config.yaml").is_file()
    assert (installed / "fedsplit" / "constraints.txt").is_file()
    assert (installed / "bin" / "fedsplit").is_file()


def test_a_run_is_composed_of_the_installed_configuration(installed, tmp_path):
    (tmp_path / "conf").mkdir()  # somebody else's: not looked at
    lines = alone(installed, "shards", "sharding=iid", "clients=3", cwd=tmp_path)
    assert [line.split()[0] for line in lines[3:6]] == ["client-0", "client-1", "client-2"]


def test_help_needs_nothing_of_the_checkout(installed, tmp_path):
    assert "shards" in "\n".join(alone(installed, "--help", cwd=tmp_path))
