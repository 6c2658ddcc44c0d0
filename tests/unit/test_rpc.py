"""The daemon's wire: frames, lines, descriptors, cancellation."""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import gc
import os
import socket
import termios
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from banger.api.base import Params
from banger.api.envelope import Reply
from banger.disk.background import Job, run_job
from banger.errors import BangerError
from banger.rpc import client, frames
from banger.rpc.blocking import BlockingChannel
from banger.rpc.channel import Channel
from banger.rpc.frames import FrameDecoder, FrameType
from banger.rpc.server import Call, Method, Server
from patience import PATIENCE_S

FRAMES = st.lists(st.tuples(st.sampled_from(list(FrameType)), st.binary(max_size=300)), max_size=8)


@given(FRAMES, st.integers(min_value=1, max_value=50))
def test_frames_survive_any_cut_of_the_stream(
    sent: list[tuple[FrameType, bytes]], piece: int
) -> None:
    stream = b"".join(frames.encode(kind, payload) for kind, payload in sent)
    decoder = FrameDecoder()
    got = []
    for i in range(0, len(stream), piece):
        got += decoder.feed(stream[i : i + piece])
    assert got == sent
    assert decoder.pending == 0


@given(st.binary(min_size=5, max_size=5))
def test_a_header_is_refused_before_anything_is_allocated(header: bytes) -> None:
    try:
        kind, length = frames.decode_header(header)
    except BangerError:
        return
    assert length <= frames.PAYLOAD_LIMIT
    assert kind in set(FrameType)


class Echo(Params, frozen=True, kw_only=True):
    text: str = ""


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    cancelled = asyncio.Event()

    async def echo(call: Call, params: Echo) -> dict[str, str]:
        return {"text": params.text}

    async def refuse(call: Call, params: Echo) -> None:
        raise BangerError("not_found", "no such thing", hint="look elsewhere", reason="gone")

    async def broken(call: Call, params: Echo) -> None:
        raise RuntimeError("a bug")

    async def full(call: Call, params: Echo) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/state/x")

    async def count(call: Call, params: Echo) -> int:
        for i in range(3):
            call.stage(f"s{i}", "counting")
            await call.data(b"x" * i)
        return 3

    async def forever(call: Call, params: Echo) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def pour(call: Call, params: Echo) -> None:
        send = call.data_sender()

        def work(job: Job) -> None:
            while True:
                send(b"x" * frames.PAYLOAD_LIMIT)
                job.check()

        try:
            await run_job(work, call)
        finally:
            cancelled.set()

    async def report(call: Call, params: Echo) -> str:
        for i in range(200):
            call.stage(f"s{i}", "working", "x" * 500)
            for done in range(200):
                call.advance(done, 200, "x" * 500)
            call.warn(f"w{i}")
            await asyncio.sleep(0)
        return "done"

    async def chatter(call: Call, params: Echo) -> None:
        while True:
            call.stage("s", "working", "x" * 5000)
            await asyncio.sleep(0)

    async def pipe(call: Call, params: Echo) -> None:
        a, b = socket.socketpair()
        b.sendall(b"hello")
        b.close()
        await call.finish({}, fds=(a.fileno(),))
        a.close()

    def method(handler: Any, *, streams: bool = False) -> Method:
        return Method(params=Echo, handler=handler, streams=streams)

    methods = {
        "echo": method(echo),
        "echo.stream": method(echo, streams=True),
        "refuse": method(refuse),
        "broken": method(broken),
        "full": method(full),
        "count": method(count, streams=True),
        "forever": method(forever),
        "pour": method(pour, streams=True),
        "report": method(report, streams=True),
        "chatter": method(chatter, streams=True),
        "pipe": method(pipe),
        "pipe.stream": method(pipe, streams=True),
    }
    # A directory name longer than sun_path: the socket must work all the same.
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    server = Server(directory / "s.sock", methods, owner_uid=os.geteuid(), version="1")
    server.cancelled = cancelled  # type: ignore[attr-defined]  # for the tests below
    server.listen()
    serving = asyncio.create_task(server.serve())
    yield server
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await server.close()


def unread_bytes(channel: BlockingChannel) -> int:
    """What lies in the client's socket: FIONREAD, ioctl_socket(2)."""
    count = array.array("i", [0])
    fcntl.ioctl(channel.fileno(), termios.FIONREAD, count)
    return count[0]


async def call(server: Server, method: str, params: dict[str, Any] | None = None) -> Any:
    return await asyncio.to_thread(client.call, server.path, method, params or {}, Any)


@pytest.mark.asyncio
async def test_a_call_gets_its_result(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    assert await call(server, "echo", {"text": "hé"}) == {"text": "hé"}


@pytest.mark.asyncio
async def test_a_full_disk_is_told_with_what_to_type(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    with pytest.raises(BangerError, match=r"full: the host's disk is full \(/state/x\)") as caught:
        await call(server, "full")
    assert (caught.value.code, caught.value.reason) == ("operation_failed", "disk_full")
    assert (caught.value.hint or "").startswith("df -h")


@pytest.mark.asyncio
async def test_an_error_keeps_code_hint_and_reason(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    with pytest.raises(BangerError) as caught:
        await call(server, "refuse")
    error = caught.value
    assert (error.code, error.hint, error.reason) == ("not_found", "look elsewhere", "gone")
    assert error.op_id is not None
    assert error.op_id.startswith("op-")


@pytest.mark.asyncio
async def test_a_bug_in_a_handler_is_an_error_and_not_a_hang(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    with pytest.raises(BangerError, match="a bug"):
        await call(server, "broken")
    assert await call(server, "echo", {"text": "still there"}) == {"text": "still there"}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("nothing", {}, "unknown_method"),
        ("echo", {"txt": "x"}, "bad_request"),
        ("echo", {"text": 1}, "bad_request"),
    ],
)
async def test_what_is_not_in_the_contract_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str, params: dict[str, Any], code: str
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    with pytest.raises(BangerError) as caught:
        await call(server, method, params)
    assert caught.value.code == code


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"version":1,"method":"ec\xffho","params":{}}',
        b'{"version":1,"method":"echo","program":"1","params":{"text":"\xff"}}',
        b'{"version":1,"method":"echo","program":"1","params":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
async def test_a_request_that_is_no_document_is_refused(server: Server, line: bytes) -> None:
    def work() -> Any:
        channel = client.connect(server.path)
        channel.sock.sendall(line + b"\n")
        answer = channel.read_line()
        channel.close()
        return msgspec.json.decode(answer or b"null")

    assert (await asyncio.to_thread(work))["error"]["code"] == "bad_request"


@pytest.mark.asyncio
async def test_a_command_of_another_version_is_told_so(server: Server) -> None:
    with pytest.raises(BangerError) as caught:
        await call(server, "echo", {"text": "x"})
    assert caught.value.code == "bad_version"


@pytest.mark.asyncio
async def test_a_stream_delivers_events_and_data_in_order_before_its_result(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    events: list[dict[str, Any]] = []

    def work() -> tuple[list[bytes], int]:
        with client.StreamingCall(server.path, "count", {}, events.append) as stream:
            data = list(stream.frames())
            return data, msgspec.json.decode(stream.result_payload)

    data, result = await asyncio.to_thread(work)
    assert (data, result) == ([b"", b"x", b"xx"], 3)
    assert [e["stage"] for e in events] == ["s0", "s1", "s2"]


@pytest.mark.asyncio
async def test_a_result_that_fits_no_frame_is_an_error_that_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    params = {"text": "x" * frames.PAYLOAD_LIMIT}

    def work() -> None:
        with client.StreamingCall(server.path, "echo.stream", params, lambda _: None) as call:
            call.result(dict)

    with pytest.raises(BangerError, match="a frame holds") as caught:
        await asyncio.to_thread(work)
    assert caught.value.outcome == "unknown"


@pytest.mark.asyncio
async def test_a_client_that_leaves_cancels_its_handler(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    channel = client.connect(server.path)
    channel.write_document({"version": 1, "method": "forever", "params": {}})
    while server.active == 0:
        await asyncio.sleep(0)
    channel.close()
    await server.cancelled.wait()  # type: ignore[attr-defined]  # set by the handler


@pytest.mark.asyncio
@pytest.mark.parametrize("ended_by", ["operations", "server"])
async def test_a_client_that_does_not_read_keeps_no_thread_from_its_end(
    server: Server, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    """As one that was stopped, or whose pager waits for a key."""
    monkeypatch.setattr(client, "__version__", "1")
    channel = client.connect(server.path)
    channel.write_document({"version": 1, "method": "pour", "params": {}})
    while not (await asyncio.to_thread(unread_bytes, channel)) > 64 << 10:
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_S):
        if ended_by == "server":
            await server.close()
        else:
            (entry,) = server.operations._entries.values()
            entry.cancel()
            async for _ in entry.follow():
                pass
        await server.cancelled.wait()  # type: ignore[attr-defined]  # set by the handler
    # What it reads now are whole frames or the end, nothing in the middle of one.
    channel.sock.settimeout(PATIENCE_S)
    assert await asyncio.to_thread(channel.read_line) is not None
    while (frame := await asyncio.to_thread(channel.read_frame)) is not None:
        assert frame[0] is not FrameType.RESULT
    channel.close()


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_progress_that_nobody_reads_is_merged_and_the_result_comes_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    before = len(asyncio.all_tasks())
    gc.collect()
    objects = len(gc.get_objects())
    channel = client.connect(server.path)
    channel.write_document({"version": 1, "method": "report", "params": {}, "program": "1"})
    while not [e for e in server.operations._entries.values() if e.state == "done"]:
        await asyncio.sleep(0)
    gc.collect()
    # Each of 40,000 events would be a task of its own, or at least a dictionary.
    assert len(asyncio.all_tasks()) <= before + 3
    assert len(gc.get_objects()) - objects < 2000

    def read() -> tuple[list[dict[str, Any]], FrameType]:
        assert channel.read_line()
        events = []
        while (frame := channel.read_frame()) is not None and frame[0] is FrameType.EVENT:
            events.append(msgspec.json.decode(frame[1]))
        assert frame is not None
        return events, frame[0]

    events, last = await asyncio.to_thread(read)
    channel.close()
    assert last is FrameType.RESULT
    assert [e["stage"] for e in events if "stage" in e][-60:] == [f"s{i}" for i in range(140, 200)]
    assert [e["warning"] for e in events if "warning" in e][-60:] == [
        f"w{i}" for i in range(140, 200)
    ]
    assert [e["done"] for e in events if "done" in e][-1] == 199


@pytest.mark.asyncio
@pytest.mark.timeout(60)
async def test_a_client_that_does_not_read_leaves_nothing_behind_when_it_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that is closed while a write waits for room gives its number to the next client."""
    monkeypatch.setattr(client, "__version__", "1")
    before = len(asyncio.all_tasks())
    channels = []
    for _ in range(3):
        channel = client.connect(server.path)
        channel.write_document({"version": 1, "method": "chatter", "params": {}, "program": "1"})
        channels.append(channel)
    full: list[int] = []
    while len(full) < 100 or len(set(full[-100:])) > 1 or not full[-1]:
        await asyncio.sleep(0)
        full.append(min(unread_bytes(channel) for channel in channels))
    for entry in list(server.operations._entries.values()):
        entry.cancel()
    async with asyncio.timeout(20):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)
    for number in range(8):
        assert await call(server, "echo", {"text": str(number)}) == {"text": str(number)}
    for channel in channels:
        channel.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["pipe", "pipe.stream"])
async def test_a_descriptor_arrives_connected(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(client, "__version__", "1")

    def work() -> bytes:
        if method == "pipe":
            _, sock = client.call_with_fd(server.path, method, {}, Any)
        else:
            with client.StreamingCall(server.path, method, {}, lambda e: None) as stream:
                stream.result(Any)
                sock = stream.fd()
        with sock:
            return sock.recv(100)

    assert await asyncio.to_thread(work) == b"hello"


@pytest.mark.asyncio
async def test_an_endless_line_is_refused() -> None:
    a, b = socket.socketpair()
    channel = Channel(a)
    other = Channel(b)

    async def flood() -> None:
        for _ in range(20):
            await other.write(b"x" * 100_000)

    flooding = asyncio.create_task(flood())
    with pytest.raises(BangerError, match="1 MiB"):
        await channel.read_line()
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)
    channel.close()
    other.close()


def test_a_reply_without_optional_parts_is_small() -> None:
    assert msgspec.json.encode(Reply(result=msgspec.Raw(b"1"))) == b'{"result":1}'


def test_a_daemon_that_is_not_there_is_told_apart_from_one_that_fails(tmp_path: Path) -> None:
    with pytest.raises(client.DaemonAbsent):
        client.connect(tmp_path / "no" / "s.sock")
    with pytest.raises(client.DaemonAbsent):
        client.connect(tmp_path / "s.sock")


@pytest.mark.asyncio
async def test_a_command_of_another_state_directory_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client, "__version__", "1")
    with pytest.raises(BangerError, match="this command means") as caught:
        await asyncio.to_thread(
            client.call, server.path, "echo", {"text": "x"}, Any, state=tmp_path / "other"
        )
    assert caught.value.code == "bad_request"
