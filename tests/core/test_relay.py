"""Work in turns: what overlaps, in which order, and how a failure ends it."""

import threading

import pytest

from fedsplit.client.relay import Relay


class Errand:
    """Pieces of work that go away twice each, and a log of what was done between."""

    def __init__(self, num_workers):
        self.relay = Relay(num_workers)
        self.log = []

    def piece(self, name):
        def work():
            for part in "abc":
                self.log.append(f"{part}{name}")
                if part != "c":
                    with self.relay.away():
                        self.at_the_wire(name, part)
            return name

        return work

    def at_the_wire(self, name, part):
        """Nothing to wait for."""

    def run(self, num_pieces):
        return self.relay.run([self.piece(i) for i in range(num_pieces)])


@pytest.mark.parametrize(
    ("num_workers", "num_pieces", "order"),
    [
        (1, 2, "a0 b0 c0 a1 b1 c1"),
        (2, 2, "a0 a1 b0 b1 c0 c1"),
        (2, 3, "a0 a1 b0 b1 c0 a2 c1 b2 c2"),
        (3, 4, "a0 a1 a2 b0 b1 b2 c0 a3 c1 c2 b3 c3"),
        (4, 1, "a0 b0 c0"),
        (2, 0, ""),
    ],
)
def test_turns_have_one_order(num_workers, num_pieces, order):
    errand = Errand(num_workers)
    assert errand.run(num_pieces) == list(range(num_pieces))
    assert errand.log == order.split()


def test_others_compute_while_one_is_away():
    class Slow(Errand):
        """The first one comes back only when the second one has gone."""

        gone = threading.Event()

        def at_the_wire(self, name, part):
            if name == 1:
                self.gone.set()
            assert self.gone.wait(10)

    assert Slow(2).run(2) == [0, 1]


def test_the_first_failure_ends_all():
    class Broken(Errand):
        """The first one fails long after the second one has, and before it in order."""

        failed = threading.Event()

        def at_the_wire(self, name, part):
            if name == 1:
                self.failed.set()
                raise LookupError("the second one's")
            if name == 0 and part == "a":
                assert self.failed.wait(10)
                raise KeyError("the first one's")

    errand = Broken(3)
    with pytest.raises(KeyError, match="the first one's"):
        errand.run(6)
    assert errand.log == ["a0", "a1", "a2"]
    assert not [t for t in threading.enumerate() if t.name.startswith("fedsplit-relay")]
    with pytest.raises(KeyError):
        errand.run(6)


def test_a_worker_knows_that_it_is_one():
    relay = Relay(2)
    assert relay.run([lambda: relay.has_me] * 3) == [True] * 3
    assert not relay.has_me
