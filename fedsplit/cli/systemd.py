"""Notifications to systemd: a service reports that it is ready, or stops (sd_notify(3))."""

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send the state of this process to systemd, if systemd started it with `Type=notify`.

    Args:
        state: An assignment such as `READY=1`.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ is in the abstract namespace of Linux.
    path = address.replace("@", "\0", 1) if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.sendto(state.encode(), path)
    except OSError as exc:
        log.warning("systemd does not receive %s at NOTIFY_SOCKET=%s: %s", state, address, exc)
