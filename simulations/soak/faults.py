"""The faults of the soak: a schedule that a seed decides, against proxies and processes."""

import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import psutil

from simulations.proxy import Proxy

_PAUSE_S = 0.2, 2.0
"""The least and the most seconds between two faults."""


class Faults:
    """Disturbs servers and the connections to them until it is stopped, in a thread of its own.

    Args:
        proxies: The proxies before the servers.
        servers: The processes of the servers.
        seed: Decides which faults there are, how long they are, and when.

    Attributes:
        counts: The number of faults of each kind.
    """

    def __init__(
        self, proxies: Sequence[Proxy], servers: Sequence[psutil.Process], seed: int
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._proxies = proxies
        self._servers = servers
        self._kinds: dict[str, tuple[Callable[[], None], int]] = {
            "reset": (self._reset, 24),
            "delay": (self._delay, 12),
            "blackhole": (lambda: self._hold(0.1, 2.0), 12),
            # Longer than a client waits for the answer to a ping.
            "outage": (lambda: self._hold(16.0, 20.0), 1),
            "freeze": (self._freeze, 6),
        }
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._disturb, name="soak-faults", daemon=True)

    def __enter__(self) -> "Faults":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _disturb(self) -> None:
        names, weights = list(self._kinds), [weight for _, weight in self._kinds.values()]
        while not self._stopped.wait(self._rng.uniform(*_PAUSE_S)):
            (name,) = self._rng.choices(names, weights)
            self._kinds[name][0]()
            self.counts[name] += 1

    def _reset(self) -> None:
        self._rng.choice(self._proxies).reset()

    def _delay(self) -> None:
        proxy = self._rng.choice(self._proxies)
        proxy.delay_s = self._rng.uniform(0.005, 0.05)
        self._stopped.wait(self._rng.uniform(0.5, 3.0))
        proxy.delay_s = 0.0

    def _hold(self, least_s: float, most_s: float) -> None:
        proxy = self._rng.choice(self._proxies)
        proxy.hold()
        self._stopped.wait(self._rng.uniform(least_s, most_s))
        proxy.heal()

    def _freeze(self) -> None:
        server = self._rng.choice(self._servers)
        server.send_signal(signal.SIGSTOP)
        self._stopped.wait(self._rng.uniform(0.1, 1.5))
        server.send_signal(signal.SIGCONT)
