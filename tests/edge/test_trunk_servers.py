"""Several trunk servers of one run: the weights are those of one, whatever ends meanwhile."""

from pathlib import Path

import psutil
import torch

from fedsplit.flower import client_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.server_app import app_with
from fedsplit.runs.folder import RunFolder
from fedsplit.telemetry.events import Contributed, Event, StepTaken
from fedsplit.telemetry.sinks import Sink
from tests.edge.federation import federate, joined, run_config, spec_for

STEPS = ("train.local_steps=4", "train.clip_norm=1.0")


class Killer(Sink):
    """Kills a follower while the step after the first one is incomplete, and another one later.

    The first one loses the work of its client. The second one has sent its client's contribution,
    and cannot pass on the reply.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.left: list[psutil.Process] = []
        self.killed: list[str] = []

    def on_event(self, event: Event) -> None:
        self.steps += isinstance(event, StepTaken)
        if not isinstance(event, Contributed):
            return
        if (self.steps, event.client) in ((1, "client-0"), (2, "client-2")):
            # The first one is the server of client-1, and the second one that of client-2.
            self.left = self.left or followers()
            self.left.pop(0).kill()
            self.killed.append(event.client)


def followers() -> list[psutil.Process]:
    """The followers of this process, the oldest first."""
    children = sorted(psutil.Process().children(), key=psutil.Process.create_time)
    return [each for each in children if "fedsplit.flower.followers" in each.cmdline()]


def test_two_followers_are_killed_in_the_middle_of_steps_and_no_weight_changes(tmp_path: Path):
    alone = federate(spec_for(tmp_path / "one", *STEPS))
    run = spec_for(tmp_path / "three", *STEPS, "launch.trunk_servers=3")
    killer = Killer()
    run_inline(
        app_with(killer), client_app.app, num_clients=3, run_config=run_config(run), workers=0
    )
    (path,) = Path(run.launch.run_dir).iterdir()
    weights, expected = joined(RunFolder(path)), joined(alone)
    assert killer.killed == ["client-0", "client-2"]
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not followers()
