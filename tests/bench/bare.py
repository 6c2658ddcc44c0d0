"""The bare run that `vm run --rm -- true` is compared with. Standard library only; one file.

    python3 -IS bare.py SPEC.json

Starts the VMM that SPEC describes on disks, initrd and tap that are there already, waits for the
guest's announcement, runs a command through the agent in the same way as banger, kills the VMM and
ends with the command's status. No daemon, no records, nothing to clean up: the least that anybody
would have to do. `bare_machine.py` writes SPEC.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any

_DEADLINE_S = 120
_STDIN_CLOSE, _EXIT, _ERROR = 0x05, 0x0E, 0x10


def main() -> int:
    with open(sys.argv[1], encoding="utf-8") as f:
        spec = json.load(f)
    os.chdir(spec["cwd"])
    listener = _listen(spec["announce"])
    began = time.monotonic()
    pid = _launch(spec["argv"], spec["console"])
    try:
        if spec["documents"]:
            _configure(spec["documents"])
        _greet(listener, spec["token"])
        # From the start of the VMM to the guest's word that it can run commands.
        print(f"{time.monotonic() - began:.4f}", flush=True)
        return _run(_connect(spec["agent"]), spec["exec"], spec["token"])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _listen(where: dict[str, Any]) -> socket.socket:
    if "unix" in where:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(where["unix"])
    else:
        listener = socket.create_server((where["host"], where["port"]))
    listener.settimeout(_DEADLINE_S)
    listener.listen(1)
    return listener


def _launch(argv: list[str], console: str) -> int:
    output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = [(os.POSIX_SPAWN_DUP2, nothing, 0)]
    files += [(os.POSIX_SPAWN_DUP2, output, n) for n in (1, 2)]
    return os.posix_spawn(argv[0], argv, {}, file_actions=files)


class _Api(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("api.sock")


def _configure(documents: list[list[Any]]) -> None:
    """Firecracker's requests; its socket is waited for as briefly as can be."""
    end = time.monotonic() + _DEADLINE_S
    while not os.path.exists("api.sock") and time.monotonic() < end:
        time.sleep(0.001)
    for path, document in documents:
        api = _Api("localhost")
        api.request("PUT", path, json.dumps(document))
        answer = api.getresponse()
        if answer.status not in (200, 204):
            raise SystemExit(f"{path}: {answer.status} {answer.read()!r}")
        api.close()


def _greet(listener: socket.socket, token: str) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as lines:
        announcement = json.loads(lines.readline())
        if announcement["token"] != token:
            raise SystemExit("somebody else announced himself")
        lines.write(json.dumps({"result": {"time_unix_ns": time.time_ns()}}).encode() + b"\n")
        lines.flush()
        lines.readline()


def _connect(where: dict[str, Any]) -> socket.socket:
    if "unix" not in where:
        sock = socket.create_connection((where["host"], where["port"]), timeout=_DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(where["unix"])
    sock.sendall(b"CONNECT %d\n" % where["port"])
    answer = b""
    while not answer.endswith(b"\n"):
        answer += sock.recv(1)
    return sock


def _run(sock: socket.socket, params: dict[str, Any], token: str) -> int:
    request = {"version": 1, "method": "exec", "params": params, "token": token}
    with sock, sock.makefile("rb") as incoming:
        sock.sendall(json.dumps(request).encode() + b"\n")
        reply = json.loads(incoming.readline())
        if "error" in reply:
            raise SystemExit(str(reply["error"]))
        sock.sendall(struct.pack(">BI", _STDIN_CLOSE, 0))
        while True:
            kind, length = struct.unpack(">BI", incoming.read(5))
            payload = incoming.read(length)
            if kind == _ERROR:
                raise SystemExit(payload.decode())
            if kind == _EXIT:
                return int(json.loads(payload).get("code", 1))


if __name__ == "__main__":
    sys.exit(main())
