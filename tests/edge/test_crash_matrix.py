"""A few cases of the crash matrix (`simulations/faults`): real processes die at named points."""

import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from simulations.faults.crash import Case, Outcome, run_with
from simulations.faults.matrix import QUICK
from simulations.faults.points import CLIENT_POINTS, POINTS, TRUNK_POINTS
from simulations.faults.watcher import watching
from simulations.faults.ways import WAYS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return run_with("inline", None)


def test_an_undisturbed_run_needs_no_restart(undisturbed):
    assert undisturbed.why == ""
    assert undisturbed.weights and undisturbed.restarts == 0
    assert math.isnan(undisturbed.struck_s) and undisturbed.load_s > 0


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_struck_run_ends_by_itself_with_the_same_weights(case, undisturbed):
    outcome = run_with(case.way, case)
    assert outcome.why == ""
    assert outcome.weights == undisturbed.weights
    assert outcome.struck_s > 0 and outcome.leftover == 0


def test_a_fault_that_did_not_happen_is_a_failure():
    outcome = run_with("inline", Case(way="inline", point="step taken", victim="run", after=9))
    assert outcome.why.startswith("the point was not reached")


def test_a_run_passes_every_point():
    points = {*TRUNK_POINTS, *CLIENT_POINTS}
    passed = set()
    with TemporaryDirectory(prefix="faults-", dir="/tmp") as name:
        (run,) = WAYS["inline"].services(Path(name))
        with watching(Path(name), points, lambda passage: passed.add(passage.point)):
            run.start()
            deadline = time.monotonic() + 120
            while run.exit_code is None and time.monotonic() < deadline:
                run.tend(restart=False)
                time.sleep(0.1)
            run.stop()
    assert run.exit_code == 0
    assert passed == {point.name for point in points}


def test_the_names_of_points_differ():
    assert len({(p.module, p.function, p.when, p.argument) for p in POINTS.values()}) == len(POINTS)
