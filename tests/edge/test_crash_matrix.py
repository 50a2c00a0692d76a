"""A few cases of the crash matrix (`simulations/faults`): real processes die at named points."""

import math

import pytest

from simulations.faults.crash import Case, Outcome, run_with
from simulations.faults.matrix import QUICK
from simulations.faults.points import POINTS

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


def test_the_names_of_points_differ():
    assert len({(p.module, p.function, p.when, p.argument) for p in POINTS.values()}) == len(POINTS)
