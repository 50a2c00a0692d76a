"""Work in turns: what overlaps, in which order, and how a failure ends it."""

import threading

import pytest

from fedsplit.client.pipeline import MicroBatchPipeline
from fedsplit.link import Link, Stream


class Errand(Link):
    """Pieces of work that wait for two replies each, and a log of what was done between."""

    def __init__(self, num_workers):
        self.pipeline = MicroBatchPipeline(self, num_workers)
        self.log = []

    def exchange(self, request):
        raise AssertionError("nothing is sent outside of a piece")

    def stream(self):
        return ErrandStream(self)

    def close(self):
        """Nothing is held."""

    def piece(self, name):
        def work():
            for part in "abc":
                self.log.append(f"{part}{name}")
                if part != "c":
                    self.pipeline.begin((name, part))()
            return name

        return work

    def at_the_wire(self, name, part):
        """Nothing to wait for."""

    def run(self, num_pieces):
        return self.pipeline.run([self.piece(i) for i in range(num_pieces)])


class ErrandStream(Stream):
    def __init__(self, errand):
        self.errand = errand

    def begin(self, request):
        return lambda: self.errand.at_the_wire(*request)


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
    assert not [t for t in threading.enumerate() if t.name.startswith("fedsplit-micro-batch")]
    with pytest.raises(KeyError):
        errand.run(6)


def test_outside_of_a_piece_there_is_nothing_to_overlap_with():
    errand = Errand(2)
    assert not errand.pipeline.is_worker
    assert errand.pipeline.run([lambda: errand.pipeline.is_worker] * 3) == [True] * 3
    assert not errand.pipeline.is_worker
