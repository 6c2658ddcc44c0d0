"""Streaming requests to an agent, spoken by hand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from typing import Any, ClassVar

from banger.rpc.frames import FrameDecoder, FrameType, encode
from fakes.agent import TOKEN, Agent
from patience import PATIENCE_S


class Talk:
    """One streaming request, spoken by hand. Those of a test end with it."""

    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, agent: Agent, method: str, **params: Any) -> None:
        self.sock = agent.connect()
        self.opened.append(self.sock)
        self.sock.settimeout(PATIENCE_S)
        self._decoder = FrameDecoder()
        self._seen: list[tuple[FrameType, bytes]] = []
        request = {"version": 1, "method": method, "params": params, "token": TOKEN}
        self.sock.sendall(json.dumps(request).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            line += self.sock.recv(1)
        self.reply = json.loads(line)

    @classmethod
    def close_all(cls) -> None:
        for sock in cls.opened:
            sock.close()
        cls.opened.clear()

    def send(self, kind: FrameType, payload: bytes = b"") -> None:
        self.sock.sendall(encode(kind, payload))

    def next(self) -> tuple[FrameType, bytes]:
        while not self._seen:
            data = self.sock.recv(1 << 16)
            assert data, "the agent has closed the connection"
            self._seen += self._decoder.feed(data)
        return self._seen.pop(0)

    def read(self, wanted: bytes) -> bytes:
        """Output until `wanted` is in it."""
        text = b""
        while wanted not in text:
            kind, payload = self.next()
            if kind in (FrameType.STDOUT, FrameType.STDERR):
                text += payload
            assert kind is not FrameType.EXIT, text
        return text

    def rest(self) -> tuple[dict[FrameType, bytes], tuple[FrameType, Any]]:
        """What was printed on each stream up to the last frame, and that frame."""
        text: dict[FrameType, bytes] = {FrameType.STDOUT: b"", FrameType.STDERR: b""}
        while True:
            kind, payload = self.next()
            if kind in text:
                text[kind] += payload
            elif kind in (FrameType.EXIT, FrameType.RESULT, FrameType.ERROR):
                return text, (kind, json.loads(payload))


def end_sessions(agent: Agent) -> None:
    """A supervisor outlives its agent: what still runs is ended by its own pid."""
    for status in (agent.directory / "sessions").glob("*/status.json"):
        document = json.loads(status.read_bytes())
        if document["state"] == "running":
            # Its command may have ended since, and be noted a moment later.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(document["pid"], signal.SIGKILL)
