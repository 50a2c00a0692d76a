"""What a process leaves that is killed in a step, or while it writes a checkpoint."""

import signal
from pathlib import Path

import pytest
import torch

from tests.edge.federation import federate, joined
from tests.edge.forked import Program
from tests.edge.killed import POINTS, run_in
from tests.edge.resuming import folder_of, resumed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happened to."""
    return joined(federate(run_in(folder, "undisturbed")))


@pytest.mark.parametrize("point", POINTS)
def test_a_server_killed_at_a_point_goes_on_to_the_same_weights(point, folder, undisturbed):
    code, _, errors = Program("tests.edge.killed", folder, point).end()
    assert code == -signal.SIGKILL, errors
    run = run_in(folder, point)
    saved = sorted(path.name for path in folder_of(run).checkpoints.glob("round-*"))
    assert saved == ["round-0000", "round-0001"], "it was to be killed in its second round"
    went_on = joined(resumed(run))
    assert went_on.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(went_on[name], tensor), name


def test_a_writer_of_a_checkpoint_killed_anywhere_leaves_the_old_or_the_new_one(tmp_path):
    code, output, errors = Program("tests.edge.killed_writer", tmp_path).end()
    versions = output.split()
    assert code == 0, errors
    assert len(versions) > 10 and set(versions) == {"old", "new"}
    assert versions == sorted(versions, reverse=True), "a version came back"
