"""The app as Flower packs and publishes it: the rules of Flower Hub, and what is in the bundle."""

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.app_cmd.publish import (
    _collect_file_paths,
    _validate_app_name,
    _validate_description,
    _validate_files,
)
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from tests.house.source import ROOT

# Flower uses what a library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")

IMPORT = """
import sys
sys.path.insert(0, ".")
import fedsplit, strategies
from fedsplit.config import compose
from fedsplit.flower import client_app, server_app
print(fedsplit.__file__, strategies.__file__, compose(["experiment=toy"]).clients)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkout that git keeps, in a folder with the name of the app."""
    folder = tmp_path_factory.mktemp("hub") / "fedsplit"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_flower_hub_would_take_the_app(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, warnings = load_and_validate(checkout / "pyproject.toml")
    assert warnings == []
    _validate_app_name(config["project"]["name"], "the app")
    _validate_description(config["project"]["description"])
    # They raise, and so does each of the rules that these check.
    _validate_files(_collect_file_paths(checkout))
    assert "Validation passed" in capsys.readouterr().out


def test_the_bundle_is_enough_to_run_the_app(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(checkout))) as bundle:
        bundle.extractall(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"fedsplit", "strategies", "conf", "LICENSE", "README.md"} <= names
    assert "tests" not in names
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, methods, clients = done.stdout.split()
    assert [Path(package).parents[1], Path(methods).parents[1]] == [tmp_path, tmp_path]
    assert clients == "2"


def test_the_target_of_the_app_is_the_oldest_flower(checkout: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    target = project["tool"]["flwr"]["app"]["flwr-version-target"].removesuffix(".0")
    assert f"flwr[simulation]>={target},<" in project["project"]["dependencies"][0]
