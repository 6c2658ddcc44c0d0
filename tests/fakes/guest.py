"""A guest without a machine: it reads its configuration from the initrd, announces itself, answers.

The host's side is real: `Announcements`, `GuestClient` and the configuration document are those of
banger, and the guest knows nothing but what the initrd tells it. It lives until `end`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from banger.disk.cpio import read_members
from banger.guest.config import CONFIG_MEMBER
from banger.rpc.frames import FrameType, encode
from banger.rpc.unix import short_path
from fakes.guest_sessions import GuestSessions

BOOT_ID = "11111111-2222-3333-4444-555555555555"
# obeys: ends the machine. ignores: answers, then lives on. refuses: an error. absent: nobody
# listens any more.
Shutdown = Literal["obeys", "ignores", "refuses", "absent"]


def read_config(initrd: Path) -> dict[str, Any]:
    """The configuration document in a VM's initrd; the last one wins, as in the kernel."""
    with initrd.open("rb") as f:
        found = [m.content for m in read_members(f) if m.name == CONFIG_MEMBER]
    document: dict[str, Any] = json.loads(found[-1])
    return document


async def announce(socket: Path, *, vm_id: str, token: str, protocol: int = 1) -> bool:
    """Announce a guest to the host's Unix socket; whether the host took it."""
    with short_path(socket) as path:
        reader, writer = await asyncio.open_unix_connection(path)
    params = {
        "vm_id": vm_id, "boot_id": BOOT_ID, "agent_version": "0.0.0-fake", "protocol": protocol,
    }  # fmt: skip
    request = {"version": 1, "method": "announce", "params": params, "token": token}
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        reply = await reader.readline()
        if not reply:
            return False
        assert "time_unix_ns" in json.loads(reply)["result"]
        writer.write(b'{"ready":true}\n')
        await writer.drain()
        return True
    except ConnectionError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class FakeGuest:
    """One guest behind a Firecracker-like vsock socket (`CONNECT <port>`, `OK <n>`), or behind the
    loopback port that QEMU forwards on its user network, with the socket where it announces itself.
    """

    def __init__(
        self,
        runtime: Path,
        config: dict[str, Any],
        power_off: Callable[[], None],
        *,
        port: int | None = None,
    ) -> None:
        self.config = config
        self.shutdown: Shutdown = "obeys"
        self.mute = False  # reads what it is asked, and closes without a word
        self.asked: list[str] = []
        self.received: list[tuple[dict[str, Any], bytes]] = []
        self.put_error: str | None = None
        self.sessions = GuestSessions()
        self.answers: dict[str, dict[str, Any]] = {}  # method → reply, for what is not fixed here
        self._socket = runtime / "vsock.sock"
        self._port = port
        self._announce = runtime / ("vsock.sock_7001" if port is None else "announce.sock")
        self._power_off = power_off
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        if self._port is not None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self._port, start_serving=False
            )
            await self._server.start_serving()
            return
        # Bound by hand: asyncio would remove the file of an earlier machine, which has to be gone.
        directory = os.open(self._socket.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            # Nothing is awaited before it is ours to end.
            self._server = await asyncio.start_unix_server(
                self._serve,
                path=f"/proc/self/fd/{directory}/{self._socket.name}",
                start_serving=False,
            )
            await self._server.start_serving()
        finally:
            os.close(directory)

    async def announce(self, *, token: str | None = None, vm_id: str | None = None) -> bool:
        return await announce(
            self._announce,
            vm_id=vm_id or self.config["vm_id"],
            token=token or self.config["token"],
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.shutdown == "absent":
                return
            if self._port is None:
                if await reader.readline() != b"CONNECT 7000\n":
                    return
                writer.write(b"OK 1073741824\n")
            line = await reader.readline()
            if self.mute:
                return
            if line and json.loads(line)["method"] == "put":
                await self._receive(json.loads(line), reader, writer)
            elif line:
                writer.write(json.dumps(self._answer(json.loads(line))).encode() + b"\n")
                await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()

    async def _receive(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One `put`: the tar is kept in `received`; `put_error` refuses it."""
        self.asked.append("put")
        assert request["token"] == self.config["token"]
        writer.write(b'{"stream":true}\n')
        tar = b""
        while (header := await reader.readexactly(5))[0] == FrameType.DATA:
            tar += await reader.readexactly(int.from_bytes(header[1:], "big"))
        assert header[0] == FrameType.DATA_END
        self.received.append((request["params"], tar))
        if self.put_error is not None:
            document = {"code": "operation_failed", "message": self.put_error}
            writer.write(encode(FrameType.ERROR, json.dumps(document).encode()))
        else:
            writer.write(encode(FrameType.RESULT, b'{"files":0,"bytes":0}'))
        await writer.drain()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        method = request["method"]
        self.asked.append(method)
        if request.get("token") != self.config["token"]:
            return {"error": {"code": "unauthorized", "message": "wrong token"}}
        match method:
            case "health":
                result: dict[str, Any] = {
                    "agent_version": "0.0.0-fake", "protocol": 1, "boot_id": BOOT_ID,
                    "uptime_s": 1.5, "hostname": self.config["hostname"], "init": "agent",
                }  # fmt: skip
            case "ports":
                result = {
                    "listeners": [
                        {"proto": "tcp", "address": "0.0.0.0", "port": 22, "process": "sshd"},
                        {"proto": "tcp", "address": "127.0.0.1", "port": 5432, "process": "a\x1b["},
                    ]
                }
            case "shutdown":
                if self.shutdown == "refuses":
                    return {"error": {"code": "operation_failed", "message": "not now"}}
                if self.shutdown == "obeys":
                    self._power_off()
                result = {}
            case _ if method in self.answers:
                return self.answers[method]
            case "stat":
                result = {
                    "kind": "directory",
                    "path": request["params"]["path"],
                    "size": 0,
                    "mode": 0o755,
                }
            case _ if method.startswith("session."):
                return self.sessions.answer(method.removeprefix("session."), request["params"])
            case _:
                return {"error": {"code": "unknown_method", "message": method}}
        return {"result": result}

    async def end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
