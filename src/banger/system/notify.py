"""Telling systemd how we are: the readiness protocol of sd_notify(3), a datagram of a few bytes."""

from __future__ import annotations

import os
import socket


def notify(*states: str) -> bool:
    """Send states such as `READY=1` to the service manager; False where there is none.

    Raises:
        OSError: NOTIFY_SOCKET names a socket that does not take it.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    # A leading @ stands for the NUL of an abstract address: unix(7).
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(name)
        sock.sendall("\n".join(states).encode())
    return True
