"""`vm cp` with a guest that is this host: the agent's connections, counted, and cut on demand."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from banger.api import results as r
from banger.api.records import VmRecord
from banger.process import read_stat
from fakes.agent import TOKEN, Agent


class Wire:
    """What `Server.call_with_fd` gives: connections to an agent.

    `carried` counts the bytes both ways. With `left` set, all connections end when so many more
    have gone through.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._guard = threading.Lock()
        self.left: int | None = None
        self.carried = 0

    def call_with_fd(self, method: str, params: Any, result: Any) -> tuple[Any, socket.socket]:
        """In place of the method of `Server`."""
        assert (method, params.vm) == ("vm.connect", "web")
        stat = read_stat(self._agent.process.pid)
        assert stat is not None
        vm = VmRecord(
            id="1" * 32, name="web", state="running", image_id="", image="", kernel="", vcpu=1,
            memory_mib=1, overlay_bytes=1, work_disk_bytes=1, address="", mac="", network="user",
        )  # fmt: skip
        access = r.AgentAccess(
            vm=vm, token=TOKEN, cwd=None, login=False, vmm_pid=self._agent.process.pid,
            vmm_start_time=stat[1],
        )  # fmt: skip
        return access, self._connect()

    def _connect(self) -> socket.socket:
        there = self._agent.connect()
        if self.left is None:
            return there
        ours, between = socket.socketpair()
        threading.Thread(target=self._relay, args=(between, there), daemon=True).start()
        return ours

    def _relay(self, here: socket.socket, there: socket.socket) -> None:
        with here, there:
            back = threading.Thread(target=self._carry, args=(there, here))
            back.start()
            self._carry(here, there)
            back.join()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                with self._guard:
                    assert self.left is not None
                    data = data[: self.left]
                    self.left -= len(data)
                    self.carried += len(data)
                target.sendall(data)
                if not self.left:
                    break
        ends = [target] if self.left else [target, source]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR if self.left else socket.SHUT_RDWR)


def describe(root: Path) -> dict[bytes, object]:
    """Everything below a directory that a copy keeps."""
    found: dict[bytes, object] = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        for base in (*names, *files):
            path = os.path.join(directory, base)
            st = os.lstat(path)
            name = os.path.relpath(path, top)
            if os.path.islink(path):
                found[name] = os.readlink(path)
            elif os.path.isdir(path):
                found[name] = st.st_mode
            elif os.path.isfile(path):
                with open(path, "rb") as f:
                    found[name] = (st.st_mode, st.st_nlink, f.read())
    return found
