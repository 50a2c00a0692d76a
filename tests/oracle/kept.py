"""Schedules that have found a fault of ours, which has been mended since."""

from simulations.schedules.schedule import Fault, Schedule

KEPT = {
    # The trunk took the copy for the next step, with the gradients of that one so far.
    "a copy of a step comes after the next backward": Schedule(
        seed=2,
        policy="async",
        steps=(2, 2),
        faults=(Fault(what="reorder", client="bob", kind="step"),),
    ),
    # The session stayed for good, and with it what the trunk kept for it.
    "a request is refused after the connection of its client was lost": Schedule(
        seed=1406,
        policy="async",
        steps=(3, 3),
        batches=2,
        faults=(
            Fault(what="delay", client="alice", kind="forward"),
            Fault(what="gone", client="alice", at=3),
        ),
    ),
}
