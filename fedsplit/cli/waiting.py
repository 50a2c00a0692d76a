"""The end of a server's command: it waits for the signal that stops it."""

import signal
import threading

from fedsplit.cli.systemd import notify

_WAKE_S = 1.0


def wait_for(stopped: threading.Event) -> None:
    """Wait for the event, and report to systemd that the server is ready, and that it stops."""
    notify("READY=1")
    # Not without a timeout: a signal can reach the process without waking this thread.
    while not stopped.wait(_WAKE_S):
        pass
    notify("STOPPING=1")


def set_on_signals(stopped: threading.Event) -> None:
    """Set the event at SIGINT or SIGTERM, in place of what the process did."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
