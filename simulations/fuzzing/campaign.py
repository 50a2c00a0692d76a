"""Runs cases one after the other, and counts those that ended otherwise than they may.

The process holds what is attacked, the attackers, and the honest client. Its memory is measured as
the system counts it (RSS), with the pages of libraries' files and what the allocator keeps free.
In the first cases, libraries load code at its first use and fill their caches. The largest is that
of oneDNN, which compiles a kernel for each shape in bfloat16 and float16. Of the few shapes of the
cases, it had all after 15,000 of them, in about 30 MiB. So the first cases are left out. The figure
does not show what a client takes that asks for many shapes; docs/security.md does.
"""

import gc
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import psutil

from fedsplit.errors import FedsplitError
from simulations.fuzzing.barrier import barrier_case
from simulations.fuzzing.case import Case
from simulations.fuzzing.configs import configs_case
from simulations.fuzzing.flower import flower_case
from simulations.fuzzing.frames import bytes_case, protobuf_case
from simulations.fuzzing.replies import replies_case
from simulations.fuzzing.requests import order_case, values_case
from simulations.fuzzing.stage import Honest, Stage, staged
from simulations.fuzzing.streams import streams_case

HANG_S = 30.0
"""A case that takes longer hangs; it is three times the deadline of a call."""

_SHOWN = 20
_TURN = 500
"""The cases between two turns of the honest client."""

_WARM_UP = 20_000
"""The cases, or half of those of a short campaign, after which memory is measured."""

LAYERS: dict[str, tuple[Callable[[Case, Stage], None], int]] = {
    "bytes": (bytes_case, 350),
    "protobuf": (protobuf_case, 250),
    "values": (values_case, 100),
    "order": (order_case, 25),
    "streams": (streams_case, 3),
    "barrier": (barrier_case, 1),
    "replies": (replies_case, 6),
    "flower": (flower_case, 146),
    "configs": (configs_case, 120),
}
"""Each layer by name: what makes and runs a case of it, and its weight."""

_NAMES = list(LAYERS)
_WEIGHTS = list(accumulate(weight for _, weight in LAYERS.values()))


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a campaign found.

    Attributes:
        cases: The number of cases of each layer.
        ends: How often each code of an error came in each layer, and `ok` for each result.
        foreign: The cases that ended in another error or in a wrong result: number and text.
        hangs: The cases that took too long: number and stack.
        crashes: The times that the trunk ended.
        honest_changed: The turns in which the honest client's bits were others than without cases.
        rss_growth_mib: The growth of the process after the first cases.
        threads_max: The most threads of the process.
    """

    cases: Counter[str] = field(default_factory=Counter)
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    foreign: list[tuple[int, str]] = field(default_factory=list)
    hangs: list[tuple[int, str]] = field(default_factory=list)
    crashes: int = 0
    honest_changed: int = 0
    rss_growth_mib: float = 0.0
    threads_max: int = 0


def campaign(first: int, cases: int, *, seed: int = 0) -> Findings:
    """Run the cases with these numbers, and an honest client beside them."""
    found, process, base_mib = Findings(), psutil.Process(), 0.0
    with _quiet(), staged() as (stage, honest, alone), _watched(found) as watch:
        for number in range(first, first + cases):
            _run(found, watch, stage, Case(seed, number))
            found.threads_max = max(found.threads_max, threading.active_count())
            if number % _TURN == 0:
                _take_turn(found, honest, alone)
            if number == first + min(_WARM_UP, cases // 2):
                base_mib = _rss_mib(process)
            if stage.crashed:
                found.crashes += 1
                break
        _take_turn(found, honest, alone)
        found.threads_max = max(found.threads_max, process.num_threads())
        found.rss_growth_mib = _rss_mib(process) - base_mib
    return found


def replay(number: int, *, seed: int = 0) -> str:
    """Run one case again; return what it sent and got, and how it ended."""
    case = Case(seed, number)
    with staged() as (stage, _, _):
        layer = _layer_of(case)
        try:
            LAYERS[layer][0](case, stage)
            end = "it ended as it may"
        except Exception:
            end = traceback.format_exc()
    return f"{layer}: {case}\n{end}"


def _layer_of(case: Case) -> str:
    return case.rng.choices(_NAMES, cum_weights=_WEIGHTS)[0]


def _run(found: Findings, watch: "_Watch", stage: Stage, case: Case) -> None:
    layer = _layer_of(case)
    found.cases[layer] += 1
    watch.begin(case.number)
    try:
        LAYERS[layer][0](case, stage)
    except FedsplitError as error:
        case.got(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{layer}: {error!r} at {last.filename}:{last.lineno}"
        found.foreign.append((case.number, text))
    finally:
        watch.end()
    found.ends.setdefault(layer, Counter()).update(case.ends)


def _take_turn(found: Findings, honest: Honest, alone: Honest) -> None:
    found.honest_changed += honest.turn() != alone.turn()


def _rss_mib(process: psutil.Process) -> float:
    gc.collect()
    return float(process.memory_info().rss) / (1 << 20)


class _Watch:
    """Notes cases that take too long, with the stack of the thread that runs them."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._ran_by = threading.get_ident()
        self._number, self._began = -1, 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fuzz-watch", daemon=True)

    def begin(self, number: int) -> None:
        """Note that a case begins."""
        self._number, self._began = number, time.monotonic()

    def end(self) -> None:
        """Note that the case has ended."""
        self._number = -1

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        noted = -1
        while not self._stopped.wait(1.0):
            number, late = self._number, time.monotonic() - self._began > HANG_S
            if number < 0 or number == noted or not late:
                continue
            noted = number
            frame = sys._current_frames()[self._ran_by]
            stack = "".join(traceback.format_stack(frame))
            self._found.hangs.append((number, stack))
            print(f"case {number} hangs:\n{stack}", file=sys.stderr, flush=True)


@contextmanager
def _watched(found: Findings) -> Iterator[_Watch]:
    watch = _Watch(found)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Log no warnings of refused requests; errors, which are faults of ours, are logged."""
    log = logging.getLogger("fedsplit")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
