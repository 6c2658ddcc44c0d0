"""What a hostile or vanished guest can do to the host's side: nothing but fail its own call."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
import pytest_asyncio

from banger.api.envelope import Request
from banger.errors import BangerError
from banger.guest import announce
from banger.guest.announce import Announcement, Announcements
from banger.guest.client import GuestClient
from banger.guest.endpoint import TcpEndpoint
from banger.rpc.channel import Channel
from banger.rpc.frames import FrameType, encode
from banger.rpc.trees import GuestFiles
from patience import PATIENCE_S

VM, TOKEN = "0" * 32, "ab" * 32
PARAMS = {"vm_id": VM, "boot_id": "b-1", "agent_version": "1.0", "protocol": 1}


def announcement(token: str = TOKEN, **params: Any) -> bytes:
    request = {"version": 1, "method": "announce", "params": PARAMS | params, "token": token}
    return msgspec.json.encode(request) + b"\n"


class Room:
    """A listener for one expected VM."""

    def __init__(self, path: Path, announced: asyncio.Future[Announcement]) -> None:
        self.path = path
        self.announced = announced

    async def say(self, line: bytes) -> bytes:
        """The answer to an announcement; empty when it was refused."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        async with asyncio.timeout(PATIENCE_S):
            writer.write(line)
            answer = await reader.readline()
            writer.write(b'{"ready":true}\n')
            await reader.read()
        writer.close()
        return answer


@pytest_asyncio.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    announcements = Announcements()
    path = tmp_path / "s"
    with announcements.expect(VM, TOKEN) as announced, announcements.listen_unix(path):
        yield Room(path, announced)
    await announcements.close()


@pytest.mark.asyncio
async def test_an_honest_guest_is_announced(room: Room) -> None:
    assert b"time_unix_ns" in await room.say(announcement())
    assert (await room.announced).boot_id == "b-1"


@pytest.mark.asyncio
@pytest.mark.parametrize("token", ["", "é", "ab", TOKEN + "0"])
async def test_a_wrong_token_is_refused(room: Room, token: str) -> None:
    refused: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: refused.append(context))
    assert await room.say(announcement(token)) == b""
    assert not room.announced.done()
    assert refused == []


@pytest.mark.asyncio
@pytest.mark.parametrize("value", ["\x1b]0;x\x07", "x" * 65, "a\nb"])
async def test_what_a_guest_calls_itself_is_short_and_harmless(room: Room, value: str) -> None:
    assert await room.say(announcement(boot_id=value)) == b""
    assert not room.announced.done()


@pytest.mark.asyncio
async def test_a_guest_that_holds_connections_keeps_no_other_guest_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(announce, "ANNOUNCE_PORT", 0)
    announcements = Announcements()
    with announcements.expect(VM, TOKEN) as announced, contextlib.ExitStack() as stack:
        announcements.ensure_tcp("127.0.0.1")
        assert announcements._tcp is not None
        port = announcements._tcp[1].getsockname()[1]
        for _ in range(80):
            hostile = stack.enter_context(socket.socket())
            hostile.bind(("127.0.0.66", 0))
            hostile.setblocking(False)
            await asyncio.get_running_loop().sock_connect(hostile, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, local_addr=("127.0.0.2", 0)
        )
        writer.write(announcement())
        async with asyncio.timeout(PATIENCE_S):
            assert b"time_unix_ns" in await reader.readline()
            writer.write(b'{"ready":true}\n')
            assert (await announced).vm_id == VM
        writer.close()
    await announcements.close()


@pytest.mark.asyncio
async def test_a_listener_survives_running_out_of_descriptors(room: Room) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (knocking.fileno() + 1, hard))
        try:
            await asyncio.get_running_loop().sock_connect(knocking, str(room.path))
            for _ in range(5):  # turns of the loop, so that the accept has failed
                await asyncio.sleep(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert b"time_unix_ns" in await room.say(announcement())


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNRESET])
async def test_an_address_that_vanished_is_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ours, theirs = socket.socketpair()

    async def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_recv", fail)
    channel = Channel(ours)
    assert await channel.read_line() is None
    channel.close()
    theirs.close()


class Agent:
    """A guest's agent that answers a put with these bytes after it has read `takes` bytes."""

    def __init__(self, answer: bytes, *, takes: int, reset: bool = False) -> None:
        self._answer = answer
        self._takes = takes
        self._reset = reset
        self.answered = asyncio.Event()
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"stream":true}\n')
        await reader.readexactly(self._takes)
        writer.write(self._answer)
        await writer.drain()
        if self._reset:
            # Unread data makes the close a reset.
            writer.transport.abort()
        self.answered.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
            writer.close()
            await writer.wait_closed()
        self.ended.set()


@contextlib.asynccontextmanager
async def guest_with(agent: Agent) -> AsyncIterator[GuestClient]:
    server = await asyncio.start_server(agent.serve, "127.0.0.1", 0, limit=1 << 16)
    port = server.sockets[0].getsockname()[1]
    try:
        yield GuestClient(TcpEndpoint(address="127.0.0.1", port=port), TOKEN)
        await agent.ended.wait()
    finally:
        server.close()


@pytest.mark.asyncio
async def test_a_put_that_the_guest_broke_off_says_what_the_guest_said() -> None:
    said = msgspec.json.encode({"code": "operation_failed", "message": "no space left"})
    agent = Agent(encode(FrameType.ERROR, said), takes=1 << 16, reset=True)
    loop = asyncio.get_running_loop()

    def write(out: BinaryIO) -> None:
        out.write(bytes(1 << 19))  # twice what is buffered
        asyncio.run_coroutine_threadsafe(agent.answered.wait(), loop).result(PATIENCE_S)
        for _ in range(64):
            out.write(bytes(1 << 18))

    async with guest_with(agent) as client:
        with pytest.raises(BangerError, match="no space left"):
            await client.put("/x", write)


@pytest.mark.asyncio
async def test_a_put_can_be_cancelled_after_the_guest_has_gone() -> None:
    agent = Agent(b"", takes=1 << 16, reset=True)
    loop = asyncio.get_running_loop()
    release = asyncio.Event()

    def write(out: BinaryIO) -> None:
        out.write(bytes(1 << 19))  # twice what is buffered
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(PATIENCE_S)

    async with guest_with(agent) as client:
        work = asyncio.create_task(client.put("/x", write))
        await agent.answered.wait()
        work.cancel()
        loop.call_later(0.05, release.set)
        with pytest.raises(asyncio.CancelledError):
            await work


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FrameType.RESULT, b"\xff{"),
        (FrameType.ERROR, b'{"code":"not_found","message":"\xff"}'),
        (FrameType.ERROR, b'{"code":"not_found","message":' + b"[" * 5000),
    ],
)
async def test_a_malformed_last_frame_is_an_error_of_the_contract(
    kind: FrameType, payload: bytes
) -> None:
    agent = Agent(encode(kind, payload), takes=5)
    async with guest_with(agent) as client:
        with pytest.raises(BangerError, match="malformed"):
            await client.put("/x", lambda out: out.write(b"x"))


@pytest.mark.parametrize(
    "name", [b"../x", b"a/../../x", b"/etc/passwd", b"a//b", b"a/", b"./a", b"..", b"a\0b"]
)
def test_listing_with_a_name_that_no_directory_holds_is_refused(name: bytes) -> None:
    """Such a name would go on into a tar that the user unpacks."""
    ours, theirs = socket.socketpair()
    entry = struct.pack("<IQQQQH", 0o100644, 0, 1, 1, 1, len(name)) + name
    request = Request(version=1, method="scan", params=msgspec.Raw(b"{}"), token="")
    files = GuestFiles(lambda: ours, lambda method, params: request)
    with theirs:
        theirs.sendall(
            b'{"result":{}}\n'
            + encode(FrameType.DATA, entry)
            + encode(FrameType.DATA_END)
            + encode(FrameType.RESULT, b'{"files":1,"bytes":0}')
        )
        with pytest.raises(BangerError, match="no directory holds"):
            files.scan("/root/repo")


def test_listing_whose_names_have_no_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest may name as many files as a listing has room for; each name as long as it can be."""
    monkeypatch.setattr("banger.rpc.trees.MAX_NAME_BYTES", 1 << 20)
    ours, theirs = socket.socketpair()
    given_up = threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError), theirs:
            theirs.recv(4096)
            theirs.sendall(b'{"result":{}}\n')
            for number in range(10_000):
                name = b"%04000d" % number
                entry = struct.pack("<IQQQQH", 0o100644, 0, 1, 1, 1, len(name)) + name
                theirs.sendall(encode(FrameType.DATA, entry))
            return
        given_up.set()

    guest = threading.Thread(target=tell)
    guest.start()
    request = Request(version=1, method="scan", params=msgspec.Raw(b"{}"), token="")
    files = GuestFiles(lambda: ours, lambda method, params: request)
    with pytest.raises(BangerError, match="no end"):
        files.scan("/root/repo")
    guest.join(PATIENCE_S)
    assert given_up.is_set()
