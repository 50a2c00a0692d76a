"""Hydra's sweeps with the launchers and sweepers of its plugins, and with jobs that fail."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from simulations.single import run_one
from tests.edge.jobs import BEST_LR
from tests.house.source import ROOT

pytestmark = pytest.mark.slow


def sweep(folder: Path, *words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "tests.edge.jobs", "-m", *words, f"launch.run_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def seeds(folder: Path) -> dict[str, str]:
    """The seed of each job by the name of its folder."""
    return {file.parent.name: file.read_text() for file in folder.glob("*/seed")}


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_runs_jobs_at_once_in_folders_of_their_own(tmp_path, launcher):
    code, _, stderr = sweep(tmp_path, f"hydra/launcher={launcher}", "name=x", "seed=1,2")
    assert (code, stderr) == (0, "")
    found = seeds(tmp_path)
    assert sorted(found) == ["x", "x-2"]
    assert sorted(found.values()) == ["1", "2"]


def test_a_sweeper_minimizes_what_a_job_returns(tmp_path):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1"]
    words += ["hydra/sweeper/sampler=grid", f"train.lr=0.1,{BEST_LR},0.001"]
    code, _, _ = sweep(tmp_path, *words)
    assert code == 0
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert float(found["best_params"]["train.lr"]) == BEST_LR
    assert math.isclose(found["best_value"], 0.0)


def test_the_bounds_of_an_interval_are_checked_before_the_first_job(tmp_path):
    words = ["hydra/sweeper=optuna", "train.lr=interval(-1,0.1)", "seed=1,2"]
    code, _, stderr = sweep(tmp_path, *words)
    assert (code, stderr) == (1, "error: train.lr=-1.0 must be greater than 0\n")
    assert list(tmp_path.iterdir()) == []


def test_the_task_of_a_run_can_be_pickled():
    assert pickle.loads(pickle.dumps(run_one)) is run_one


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_goes_on_after_a_job_that_failed(tmp_path, launcher):
    code, _, stderr = sweep(tmp_path, f"hydra/launcher={launcher}", "name=x", "seed=13,1,14,2")
    assert code == 1
    assert sorted(seeds(tmp_path).values()) == ["1", "2"]
    told = [line for line in stderr.splitlines() if line.startswith("error: job ")]
    assert any("0 (name=x seed=13" in line and "no data for seed 13" in line for line in told)
    assert any("2 (name=x seed=14" in line and "KeyError: 'wte'" in line for line in told)
    assert "Traceback" not in stderr


def test_debug_shows_the_traceback_of_a_job(tmp_path):
    code, _, stderr = sweep(tmp_path, "seed=14", "--debug")
    assert code == 1
    assert "Traceback" in stderr and "in job" in stderr


def test_an_experiment_refuses_a_launcher_that_it_would_not_use(tmp_path):
    code, _, stderr = sweep(tmp_path, "experiment=convergence", "hydra/launcher=joblib")
    assert code == 1
    assert "hydra/launcher=joblib has no effect: convergence trains its variants itself" in stderr
