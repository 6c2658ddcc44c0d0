"""Much output and a reader that does not read: the guest keeps what it promises to keep, in files,
and neither its agent nor a session's supervisor grows."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.rpc.frames import FrameType
from fakes.agent import Agent, running_agent
from fakes.talk import Talk, end_sessions
from patience import PATIENCE_S

_MOST_KB = 40 << 10  # Go's own heap and the frames on their way are some 20 MB
_SIZE = 100 << 20


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent
        Talk.close_all()
        end_sessions(agent)


def _peak_kb(pid: int) -> int:
    """The most memory that a process has had (proc_pid_status(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _start(agent: Agent, *argv: str) -> None:
    params = {"name": "one", "argv": argv, "env": {}, "login": False, "stdin_mode": "detached",
              "require": [], "tags": []}  # fmt: skip
    assert "result" in Talk(agent, "session.start", **params).reply


def _status(agent: Agent) -> dict[str, object]:
    document: dict[str, object] = Talk(agent, "session.show", name="one").reply["result"]
    return document


def _supervisor(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_reader_that_stops_reading_costs_nothing_and_misses_only_what_is_counted(
    agent: Agent,
) -> None:
    script = f"read -r go < {agent.directory}/go; head -c {_SIZE} /dev/urandom; sleep 60"
    os.mkfifo(agent.directory / "go")
    _start(agent, "sh", "-c", script)
    pid = _status(agent)["pid"]
    assert isinstance(pid, int)
    supervisor = _supervisor(pid)
    slow = [Talk(agent, "session.logs", name="one", follow=True) for _ in range(3)]
    (agent.directory / "go").write_text("\n")
    heads = [reader.next()[1] for reader in slow]
    deadline = time.monotonic() + PATIENCE_S
    while _status(agent)["logs"]["stdout"]["end"] < _SIZE:  # type: ignore[index]
        assert time.monotonic() < deadline
    assert _peak_kb(supervisor) < _MOST_KB
    assert _peak_kb(agent.process.pid) < _MOST_KB
    end_sessions(agent)
    for reader, head in zip(slow, heads, strict=True):
        got = len(head)
        while (frame := reader.next())[0] is not FrameType.RESULT:
            got += len(frame[1])
        assert got + json.loads(frame[1])["dropped"] == _SIZE
        assert got >= 48 << 20
    assert _peak_kb(agent.process.pid) < _MOST_KB


def test_slow_reader_of_a_command_slows_the_command_and_costs_nothing(agent: Agent) -> None:
    params = {"argv": ["head", "-c", str(_SIZE), "/dev/zero"], "env": {}, "login": False,
              "tty": None}  # fmt: skip
    talk = Talk(agent, "exec", **params)
    got = len(talk.next()[1])
    for _ in range(50):
        got += len(talk.next()[1])
    assert _peak_kb(agent.process.pid) < _MOST_KB
    while (frame := talk.next())[0] is FrameType.STDOUT:
        got += len(frame[1])
    assert (got, frame) == (_SIZE, (FrameType.EXIT, b'{"code":0}'))
    assert _peak_kb(agent.process.pid) < _MOST_KB


def test_tail_of_millions_of_single_bytes_costs_nothing(agent: Agent) -> None:
    _start(agent, "true")
    deadline = time.monotonic() + PATIENCE_S
    while _status(agent)["state"] != "exited":
        assert time.monotonic() < deadline
    (directory,) = (p.parent for p in agent.directory.glob("sessions/*/status.json"))
    count = 600_000
    record = struct.Struct(">QQIc")
    segment = directory / "stdout.0000000000000000"
    segment.write_bytes(b"".join(record.pack(n, n, 1, b"\n") for n in range(count)))
    text, (kind, _) = Talk(agent, "session.logs", name="one", tail=1000).rest()
    assert (len(text[FrameType.STDOUT]), kind) == (1000, FrameType.RESULT)
    assert _peak_kb(agent.process.pid) < _MOST_KB
