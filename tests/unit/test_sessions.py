"""Sessions on the real agent: started, looked at, written to, ended, and found again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from banger.api.sessions import Session, StartSession, TerminalSize
from banger.errors import BangerError
from banger.guest.client import GuestClient
from banger.guest.endpoint import TcpEndpoint
from banger.rpc.frames import FrameType
from banger.session import sessions
from fakes.agent import TOKEN, Agent, running_agent
from fakes.talk import Talk, end_sessions
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


class Local(GuestClient):
    """A client of an agent on this host, through its Unix socket."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(TcpEndpoint(address="127.0.0.1", port=1), TOKEN)
        self._agent = agent

    async def open(self, *, timeout_s: float = 5) -> socket.socket:
        sock = self._agent.connect()
        sock.setblocking(False)
        return sock


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent
        Talk.close_all()
        end_sessions(agent)


@pytest_asyncio.fixture
async def guest(agent: Agent) -> AsyncIterator[GuestClient]:
    yield Local(agent)


async def start(guest: GuestClient, *argv: str, name: str = "one", **more: Any) -> Session:
    return await sessions.start(guest, "web", StartSession(vm="web", name=name, argv=argv, **more))


async def ended(guest: GuestClient, name: str = "one") -> Session:
    """The session once it has ended."""
    async with asyncio.timeout(PATIENCE_S):
        while (now := await sessions.show(guest, "web", name)).live:
            await asyncio.sleep(0.01)
    return now


def logs(agent: Agent, name: str = "one", **params: Any) -> tuple[bytes, bytes, dict[str, Any]]:
    text, (kind, end) = Talk(agent, "session.logs", name=name, **params).rest()
    assert kind is FrameType.RESULT, end
    return text[FrameType.STDOUT], text[FrameType.STDERR], end


async def test_session_outlives_its_connection_and_keeps_output_and_status(
    guest: GuestClient, agent: Agent
) -> None:
    session = await start(guest, "sh", "-c", "echo out; echo err >&2; exit 3", tags=("a", "b"))
    assert (session.name, session.stdin_mode, session.tags) == ("one", "detached", ("a", "b"))
    now = await ended(guest)
    assert (now.state, now.code, now.signal, now.attached) == ("exited", 3, None, False)
    assert now.logs is not None
    assert (now.logs["stdout"].end, now.logs["stderr"].end) == (4, 4)
    assert logs(agent)[:2] == (b"out\n", b"err\n")
    assert logs(agent, stream="stderr")[:2] == (b"", b"err\n")


async def test_environment_directory_and_user_are_the_sessions_and_are_not_shown(
    guest: GuestClient, agent: Agent, tmp_path: Path
) -> None:
    session = await start(
        guest, "sh", "-c", "echo $SECRET,$PWD", env={"SECRET": "hush"}, cwd=str(tmp_path)
    )
    await ended(guest)
    assert logs(agent)[0] == f"hush,{tmp_path}\n".encode()
    assert "hush" not in repr(session)


async def test_every_missing_program_is_named_before_anything_starts(guest: GuestClient) -> None:
    with pytest.raises(BangerError) as caught:
        await start(guest, "no-such-1", require=("sh", "no-such-2"))
    assert caught.value.code == "not_found"
    assert "no-such-1" in str(caught.value) and "no-such-2" in str(caught.value)
    assert await sessions.list_sessions(guest, "web") == []


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a b", "x" * 64, "a/b", ".."])
async def test_bad_names_are_refused_and_leave_nothing(guest: GuestClient, name: str) -> None:
    with pytest.raises(BangerError) as caught:
        await start(guest, "true", name=name)
    assert caught.value.code == "bad_request"
    assert await sessions.list_sessions(guest, "web") == []


async def test_name_is_unique_until_its_session_is_removed(guest: GuestClient) -> None:
    await start(guest, "sleep", "60")
    with pytest.raises(BangerError) as caught:
        await start(guest, "true")
    assert (caught.value.code, caught.value.reason) == ("already_exists", "in_use")
    with pytest.raises(BangerError) as caught:
        await sessions.remove(guest, "one")
    assert caught.value.reason == "in_use"
    await sessions.kill(guest, "web", "one", signal="SIGKILL")
    await sessions.remove(guest, "one")
    await start(guest, "true")


async def test_stop_ends_in_order_and_kill_at_once(guest: GuestClient, agent: Agent) -> None:
    script = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.02; done"
    await start(guest, "sh", "-c", script)
    Talk(agent, "session.logs", name="one", follow=True).read(b"ready")
    now = await sessions.stop(guest, "web", "one", timeout_s=PATIENCE_S)
    assert (now.state, now.code) == ("exited", 7)
    assert logs(agent)[0] == b"ready\nbye\n"
    await start(guest, "sh", "-c", "trap '' TERM; echo ready; sleep 60 & wait", name="two")
    Talk(agent, "session.logs", name="two", follow=True).read(b"ready")
    now = await sessions.stop(guest, "web", "two", timeout_s=0.2)
    assert (now.state, now.signal) == ("exited", "KILL")


async def test_the_order_of_both_streams_is_kept(guest: GuestClient, agent: Agent) -> None:
    # One write after the other was recorded, so that their order is not left to the scheduler.
    await start(guest, "cat", stdin_mode="pipe", name="cat")
    script = "for i in 1 2 3; do echo o$i; read x; echo e$i >&2; read x; done"
    await start(guest, "sh", "-c", script, stdin_mode="pipe")
    talk = Talk(agent, "session.attach", name="one")
    seen = []
    for i in (1, 2, 3):
        for word in (f"o{i}", f"e{i}"):
            seen.append(talk.read(word.encode()))
            talk.send(FrameType.STDIN, b"\n")
    await ended(guest)
    order = []
    log = Talk(agent, "session.logs", name="one")
    while (frame := log.next())[0] is not FrameType.RESULT:
        order.append(frame[1])
    assert order == seen


async def test_a_cursor_goes_on_where_the_last_call_ended(guest: GuestClient, agent: Agent) -> None:
    await start(guest, "sh", "-c", "echo one; read x; echo two", stdin_mode="pipe")
    Talk(agent, "session.logs", name="one", follow=True).read(b"one\n")
    first = logs(agent)
    assert first[0] == b"one\n"
    Talk(agent, "session.send", name="one", end=True).send(FrameType.STDIN_CLOSE)
    await ended(guest)
    out, _, end = logs(agent, since=first[2]["cursor"])
    assert (out, end["dropped"], end["state"]) == (b"two\n", 0, "exited")
    assert logs(agent, since=end["cursor"])[0] == b""
    assert Talk(agent, "session.logs", name="one", since="x").rest()[1][0] is FrameType.ERROR


@pytest.mark.parametrize(
    ("lines", "expected"), [(0, b""), (1, b"3"), (2, b"2\n3"), (3, b"1\n2\n3"), (9, b"1\n2\n3")]
)
async def test_tail_is_the_last_lines(
    guest: GuestClient, agent: Agent, lines: int, expected: bytes
) -> None:
    await start(guest, "printf", "1\\n2\\n3")
    await ended(guest)
    assert logs(agent, tail=lines)[0] == expected


async def test_follow_shows_what_comes_and_ends_with_the_session(
    guest: GuestClient, agent: Agent
) -> None:
    await start(guest, "sh", "-c", "echo begin; read x; echo got $x", stdin_mode="pipe")
    readers = [Talk(agent, "session.logs", name="one", follow=True) for _ in range(3)]
    for reader in readers:
        reader.read(b"begin")
    send = Talk(agent, "session.send", name="one")
    send.send(FrameType.STDIN, b"word\n")
    send.send(FrameType.STDIN_CLOSE)
    assert send.rest()[1] == (FrameType.RESULT, {"bytes": 5})
    for reader in readers:
        text, (kind, end) = reader.rest()
        assert (text[FrameType.STDOUT], kind, end["state"]) == (
            b"got word\n", FrameType.RESULT, "exited",
        )  # fmt: skip


async def test_attach_shows_the_past_takes_input_and_returns_the_status(
    guest: GuestClient, agent: Agent
) -> None:
    await start(guest, "sh", "-c", "echo past; read x; echo got $x; exit 5", stdin_mode="pipe")
    first = Talk(agent, "session.attach", name="one")
    first.read(b"past")
    assert (await sessions.show(guest, "web", "one")).attached
    second = Talk(agent, "session.attach", name="one")
    assert second.reply["error"]["reason"] == "in_use"
    first.sock.close()
    async with asyncio.timeout(PATIENCE_S):
        while (await sessions.show(guest, "web", "one")).attached:
            await asyncio.sleep(0.01)
    third = Talk(agent, "session.attach", name="one")
    assert third.read(b"past")
    third.send(FrameType.STDIN, b"again\n")
    text, end = third.rest()
    assert (text[FrameType.STDOUT], end) == (b"got again\n", (FrameType.EXIT, {"code": 5}))


async def test_a_terminal_session_is_one_and_changes_its_size(
    guest: GuestClient, agent: Agent
) -> None:
    script = """
        test -t 0 && test -t 1 && stty size
        until [ "$(stty size)" = "22 44" ]; do sleep 0.02; done
    """
    size = TerminalSize(rows=11, cols=33)
    await start(guest, "sh", "-c", script, tty=size, stdin_mode="pipe")
    talk = Talk(agent, "session.attach", name="one")
    talk.read(b"11 33")
    talk.send(FrameType.RESIZE, b'{"rows":22,"cols":44}')
    assert talk.rest()[1] == (FrameType.EXIT, {"code": 0})


async def test_input_is_refused_where_there_is_none(guest: GuestClient, agent: Agent) -> None:
    await start(guest, "sleep", "60")
    for method in ("session.attach", "session.send"):
        assert Talk(agent, method, name="one").reply["error"]["code"] == "bad_request"


async def test_messages_of_many_senders_stay_whole(guest: GuestClient, agent: Agent) -> None:
    await start(guest, "cat", stdin_mode="pipe")
    messages = [bytes([c]) * 100_000 + b"\n" for c in b"abcd"]
    talks = [Talk(agent, "session.send", name="one") for _ in messages]

    def send(talk: Talk, message: bytes) -> None:
        for at in range(0, len(message), 7_001):
            talk.send(FrameType.STDIN, message[at : at + 7_001])
        talk.send(FrameType.STDIN_CLOSE)
        assert talk.rest()[1] == (FrameType.RESULT, {"bytes": len(message)})

    await asyncio.gather(
        *(asyncio.to_thread(send, t, m) for t, m in zip(talks, messages, strict=True))
    )
    end = Talk(agent, "session.send", name="one", end=True)
    end.send(FrameType.STDIN_CLOSE)
    await ended(guest)
    assert sorted(logs(agent)[0].splitlines(keepends=True)) == messages


async def test_much_output_keeps_the_newest_and_says_what_was_dropped(
    guest: GuestClient, agent: Agent
) -> None:
    size = 100 << 20
    await start(guest, "head", "-c", str(size), "/dev/zero")
    now = await ended(guest)
    assert now.logs is not None
    kept = now.logs["stdout"]
    assert kept.end == size
    assert 48 << 20 <= kept.end - kept.start <= 64 << 20
    disk = sum(f.stat().st_size for f in (agent.directory / "sessions").glob("*/stdout.*"))
    assert disk <= 72 << 20
    talk = Talk(agent, "session.logs", name="one")
    total = 0
    while (frame := talk.next())[0] is not FrameType.RESULT:
        total += len(frame[1])
    assert (total, json.loads(frame[1])["dropped"]) == (size - kept.start, kept.start)


async def test_session_survives_the_agent_and_is_found_by_the_next(agent: Agent) -> None:
    guest = Local(agent)
    await start(guest, "sh", "-c", "echo one; read x; echo two $x", stdin_mode="pipe")
    Talk(agent, "session.logs", name="one", follow=True).read(b"one")
    agent.restart()
    assert (await sessions.show(guest, "web", "one")).state == "running"
    send = Talk(agent, "session.send", name="one")
    send.send(FrameType.STDIN, b"words\n")
    send.send(FrameType.STDIN_CLOSE)
    assert (await ended(guest)).code == 0
    assert logs(agent)[0] == b"one\ntwo words\n"


async def test_session_whose_supervisor_was_killed_is_lost(
    guest: GuestClient, agent: Agent
) -> None:
    session = await start(guest, "sleep", "60")
    supervisor = int(Path(f"/proc/{session.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while (await sessions.show(guest, "web", "one")).state != "lost":
            await asyncio.sleep(0.01)
    await sessions.remove(guest, "one")


async def test_more_than_sixteen_are_refused(guest: GuestClient) -> None:
    for i in range(16):
        await start(guest, "sleep", "60", name=f"s{i}")
    with pytest.raises(BangerError, match="16"):
        await start(guest, "sleep", "60", name="s16")
    await sessions.kill(guest, "web", "s3", signal="KILL")
    await start(guest, "sleep", "60", name="s16")
    names = [s.name for s in await sessions.list_sessions(guest, "web")]
    assert names == [f"s{i}" for i in range(17)]


async def test_a_place_for_an_agent_names_what_the_guest_lacks(
    guest: GuestClient, tmp_path: Path
) -> None:
    place = await sessions.find_place(
        guest, "web", ("cat",), cwd=str(tmp_path), workspace=None, user=None
    )
    assert (place.cwd, place.has_shell) == (str(tmp_path), True)
    with pytest.raises(BangerError) as caught:
        await sessions.find_place(
            guest, "web", ("no-such",), cwd=None, workspace=str(tmp_path), user=None
        )
    assert (caught.value.code, "no-such" in str(caught.value)) == ("not_found", True)
