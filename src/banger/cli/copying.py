"""One `banger vm cp`: its connection to the agent, and how far it is. It lives as long as the
command; each exchange has a connection of its own."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.cli.guest_run import attended
from banger.cli.server import Server
from banger.rpc.trees import GuestFiles
from banger.units import format_size

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from banger.cli.draw import Painter

T = TypeVar("T")

LARGE_BYTES = 8 << 20
"""Files of this size or more travel alone, so that an interrupted copy goes on inside them; the
others together, so that it goes on with the next one."""
_STEP = 1 << 20


class Copying:
    """The VM, its agent, the progress."""

    def __init__(self, vm: str, painter: Painter) -> None:
        self.vm = vm
        self._painter = painter
        self._server = Server()
        self._token = ""
        self._access: r.AgentAccess | None = None
        self._total: int | None = None
        self._done = self._told = 0
        self._spared = 0
        self._files = self._same = 0
        self._began = time.monotonic()
        self.guest = GuestFiles(self._connect, self._request)

    def _connect(self) -> socket.socket:
        access, sock = self._server.call_with_fd(
            "vm.connect", p.ConnectVm(vm=self.vm), r.AgentAccess
        )
        self._access, self._token = access, access.token
        connected: socket.socket = sock
        return connected

    def _request(self, method: str, params: dict[str, Any]) -> Request:
        raw = msgspec.Raw(msgspec.json.encode(params))
        return Request(version=PROTOCOL_VERSION, method=method, params=raw, token=self._token)

    def attended(self, work: Callable[[], T]) -> T:
        """Run exchanges; they end when the machine does, where their socket would stay silent."""
        assert self._access is not None  # a stat came first
        with attended(self._access) as machine:
            read, write = os.pipe()
            watcher = threading.Thread(
                target=_watch, args=(machine, read, self.guest.cancel), daemon=True
            )
            watcher.start()
            try:
                return work()
            finally:
                os.close(write)
                watcher.join()
                os.close(read)

    # How far it is

    def stage(self, label: str, detail: str) -> None:
        """What is done now."""
        self._painter({"stage": "copy", "label": label, "detail": detail})

    def expect(self, total: int | None) -> None:
        """The bytes of all that will be copied or found there."""
        self._total = total

    def advance(self, count: int) -> None:
        """Some bytes have been copied."""
        self._done += count
        if self._done - self._told >= _STEP:
            self._tell()

    def spare(self, count: int, *, files: int = 0) -> None:
        """Some bytes are there already, of whole files or of the beginning of one."""
        self._spared += count
        self._same += files
        self._done += count
        self._tell()

    def landed(self, files: int = 1) -> None:
        """Some files are whole."""
        self._files += files

    def _tell(self) -> None:
        self._told = self._done
        of = f" of {format_size(self._total)}" if self._total else ""
        size = f"{format_size(self._done)}{of}, " if self._total else ", "
        self._painter({"done": self._done, "total": self._total, "detail": f"{size}{self._rate()}"})

    def _rate(self) -> str:
        took = max(time.monotonic() - self._began, 0.001)
        return f"{format_size(int((self._done - self._spared) / took))}/s"

    def finish(self) -> None:
        """Say what was done."""
        copied = self._done - self._spared
        there = f"; {format_size(self._spared)} were there already" if self._spared else ""
        files = f"{self._files} file{'' if self._files == 1 else 's'}"
        self._painter(
            {
                "stage": "copied",
                "label": f"{files}, {format_size(copied)}, {self._rate()}{there}",
                "detail": "",
            }
        )


def _watch(machine: int | None, stop: int, cancel: Callable[[], None]) -> None:
    import select

    if machine is None:
        return
    ready = select.select([machine, stop], [], [])[0]
    if machine in ready and stop not in ready:
        cancel()
