"""Runs that break off, and go on from their checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedsplit.errors import Diverged
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from tests.edge.federation import client_that, federate


def breaking_in(round: int):
    """A client app that fails from this round on, as if the machines were gone."""

    def work(message, context, go_on):
        if message.content.config_records["fedsplit"]["round"] >= round:
            raise RuntimeError("the power is gone")
        return go_on()

    # A round that selected some of the clients goes on to its evaluation, which has all of them.
    return client_that(train=work, evaluate=work)


def interrupted(run: RunSpec, round: int) -> RunFolder:
    with pytest.raises(Diverged, match="the power is gone"):
        federate(run, breaking_in(round))
    return folder_of(run)


def resumed(run: RunSpec, resume: str = "auto") -> RunFolder:
    return federate(replace(run, resume=resume))


def folder_of(run: RunSpec) -> RunFolder:
    return RunFolder(Path(run.launch.run_dir) / run.name)
