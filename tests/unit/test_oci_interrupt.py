"""Transfers that are ended from another thread."""

from __future__ import annotations

import socket
import threading

import pytest

from banger.disk.background import Job
from banger.oci.http import BrokenTransfer, Http
from patience import PATIENCE_S


@pytest.mark.parametrize("ending", ["", "Connection: close\r\n"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_transfer_whose_server_stays_silent_ends_when_it_is_interrupted(
    version: str, ending: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        http = Http(Job())
        begun = threading.Event()
        outcome: list[BaseException] = []

        def read() -> None:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
            try:
                with http.request("GET", url) as response:
                    while response.read():
                        begun.set()
            except BrokenTransfer as e:
                outcome.append(e)

        reader = threading.Thread(target=read)
        reader.start()
        with server.accept()[0] as peer:
            peer.recv(4096)
            head = f"HTTP/{version} 200 OK\r\nContent-Length: 1000000\r\n{ending}\r\n"
            peer.sendall(head.encode() + b"x" * 70_000)
            assert begun.wait(PATIENCE_S)
            http.interrupt()
            reader.join(PATIENCE_S)
            assert not reader.is_alive()
        http.close()
    assert len(outcome) == 1
