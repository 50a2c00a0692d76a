"""Run the suites of transformers and peft on whole models and on split ones, and compare.

A test is lost if it passes with a whole model and fails with a split one. The program ends with
status 1 if a loss is neither a refusal of fedsplit nor listed in `EXPLAINED`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.core.families import FAMILIES
from tests.house.source import ROOT
from tests.peers.explained import EXPLAINED
from tests.peers.sources import download, install

# They inherit from parts of the suite that the source distribution does not have.
ABSENT = {
    "exporters": ("test_export", "ExportTesterMixin"),
    "generation": ("test_utils", "GenerationTesterMixin"),
}
# Imported by the suites; no test of theirs that runs here uses them.
NEEDED = ("parameterized", "diffusers")
Outcomes = dict[str, dict[str, Any]]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("suite", choices=["transformers", "peft"])
    parser.add_argument("--families", default=",".join(FAMILIES), help="of transformers' suite")
    parser.add_argument("-k", default="", help="pytest's expression for the tests to run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = prepared(asked.suite, folder)
        environment = {"PEERS_FAMILIES": asked.families, "PYTHONPATH": f"{ROOT}:{folder}"}
        whole, split = (
            outcomes(models, [*words, "-k", asked.k], folder, environment)
            for models in ("whole", "split")
        )
    lost = {name: split[name] for name in whole if is_lost(whole[name], split.get(name))}
    passed = sum(each["outcome"] == "passed" for each in whole.values())
    if not passed:
        sys.exit("no test passes with whole models; pytest's output above says why")
    print(f"{asked.suite}: {passed} tests pass with whole models, {len(lost)} are lost\n")
    print_counts(whole, lost)
    unexplained = print_table(lost)
    sys.exit(f"{unexplained} losses are not explained" if unexplained else 0)


def prepared(suite: str, folder: Path) -> list[str]:
    """Unpack a suite into a folder; return pytest's arguments."""
    package = folder / f"{suite}_tests"
    (download(suite, folder) / "tests").rename(package)
    (package / "__init__.py").touch()
    for needed in NEEDED:
        install(needed, folder)
    if suite == "peft":
        return ["-p", "tests.peers.peft_models", str(package / "test_decoder_models.py")]
    for name, (module, mixin) in ABSENT.items():
        (package / name).mkdir()
        (package / name / f"{module}.py").write_text(f"class {mixin}:\n    pass\n")
    return [str(ROOT / "tests" / "peers" / "modeling_suite.py")]


def outcomes(models: str, words: list[str], folder: Path, environment: dict[str, str]) -> Outcomes:
    """Run a suite on whole or split models; return the outcomes by the test's name."""
    file, settings = folder / f"{models}.json", folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    options = ["-q", "--tb=no", "--no-header", "--noconftest", "-c", str(settings)]
    options += ["-p", "tests.peers.recorder", "--outcomes", str(file), "-W", "ignore"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PEERS_MODELS": models, **environment}
    command = [sys.executable, "-m", "pytest", *options, *words]
    subprocess.run(command, env=variables, cwd=folder, check=False)
    read: Outcomes = json.loads(file.read_text())
    return read


def is_lost(whole: dict[str, Any], split: dict[str, Any] | None) -> bool:
    """Whether a test passes with a whole model, and neither passes nor is skipped with a split."""
    return whole["outcome"] == "passed" and split is not None and split["outcome"] == "failed"


def print_counts(whole: Outcomes, lost: Outcomes) -> None:
    """Print how many tests of each class of the suite pass, are lost, and are refused."""
    print("| suite | pass with whole models | lost | of these refused |\n|---|---|---|---|")
    for suite in sorted({name.partition("::")[0] for name in whole}):
        passed = [n for n, o in whole.items() if f"{suite}::" in n and o["outcome"] == "passed"]
        refused = [lost[name]["refused"] for name in passed if name in lost]
        print(f"| {suite} | {len(passed)} | {len(refused)} | {sum(refused)} |")
    print()


def print_table(lost: Outcomes) -> int:
    """Print the lost tests, those of one cause together; return how many have no explanation."""
    causes: dict[tuple[str, str, str], int] = {}
    unexplained = 0
    for name, outcome in sorted(lost.items()):
        test = re.split(r"\[|_\d+_(?=fp|bf)", name.rpartition("::")[2])[0]
        reason = "refused" if outcome["refused"] else EXPLAINED.get(test, "")
        unexplained += not reason
        error = re.sub(r"/\S*/tmp\w{8}", "DIRECTORY", f"{outcome['error']}: {outcome['text']}")
        row = test, reason or "NOT EXPLAINED", error[:160]
        causes[row] = causes.get(row, 0) + 1
    print("| test | times | why | error |\n|---|---|---|---|")
    for (test, reason, error), times in causes.items():
        print(f"| {test} | {times} | {reason} | {error} |")
    return unexplained


if __name__ == "__main__":
    main()
