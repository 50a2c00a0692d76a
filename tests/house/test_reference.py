"""The reference is made of the code as it is now, and all pages together make a site."""

import subprocess
import sys
from pathlib import Path

import pytest

from simulations.reference.__main__ import stale_pages
from tests.house.source import ROOT


def test_the_reference_is_up_to_date():
    assert not stale_pages(), "run: python -m simulations.reference --write"


@pytest.mark.slow
def test_the_pages_make_a_site_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs"]
    folders = ["-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "site")]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "reference" / "config.html").is_file()
