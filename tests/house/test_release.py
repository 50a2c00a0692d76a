"""What a release says of itself is the same in every file, and it is published without a token."""

import re
import tomllib

import yaml

from simulations.release import FLOWERS, PYTHONS
from tests.house.source import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version():
    assert CITATION["version"] == PROJECT["version"]
    assert [each["name"] for each in CITATION["authors"]] == [
        each["name"] for each in PROJECT["authors"]
    ]


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^## (\S+) - ", CHANGELOG, re.MULTILINE)[0] == PROJECT["version"]


def test_the_pythons_are_those_that_a_release_is_checked_with():
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    assert tuple(named) == PYTHONS
    setup = next(s for s in WORKFLOW["jobs"]["build"]["steps"] if "python-version" in str(s))
    assert sorted(setup["with"]["python-version"].split()) == list(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_versions_of_flower_are_those_that_a_release_is_checked_with():
    (flower,) = (each for each in PROJECT["dependencies"] if each.startswith("flwr["))
    minors = [int(each.partition(".")[2]) for each in FLOWERS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert flower == f"flwr[simulation]>=1.{minors[0]},<1.{minors[-1] + 1}"


def test_a_release_is_checked_before_it_is_published_without_a_token():
    build, publish = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert {".ci/run", "make docs", "make release-check"} <= set(commands)
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in str(WORKFLOW)
