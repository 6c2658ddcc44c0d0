"""A loopback address that no other process of this host binds to.

A port that is found free on 127.0.0.1 is somebody else's a moment later, now and then; here a
program that is told its port beforehand finds it free.
"""

from __future__ import annotations

import os
import socket


def own_address() -> str:
    """One of 127.77.0.0/16, by this process's number."""
    number = os.getpid() & 0xFFFF
    return f"127.77.{number >> 8}.{number & 0xFF}"


def free_port(address: str) -> int:
    """A port that is free there, for UDP too."""
    while True:
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind((address, 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind((address, port))
            except OSError:
                continue
            return port
