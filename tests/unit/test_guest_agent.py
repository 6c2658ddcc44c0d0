"""The host's side of the agent against the real agent: endpoints, calls, trees, its own end."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import pytest_asyncio

from banger.errors import BangerError
from banger.guest.client import GuestClient
from banger.guest.endpoint import TcpEndpoint, VsockEndpoint
from fakes.agent import TOKEN, Agent, running_agent
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


@pytest_asyncio.fixture
async def guest(agent: Agent) -> AsyncIterator[GuestClient]:
    """A client of the agent, through a relay that does what Firecracker does for vsock."""
    path = agent.directory / "vsock"
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() != b"CONNECT 7000\n":
            writer.close()
            return
        writer.write(b"OK 1234\n")
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(agent.socket))
        for work in (pump(reader, inner_writer), pump(inner_reader, writer)):
            task = asyncio.ensure_future(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(relay, path=str(path))
    yield GuestClient(VsockEndpoint(path=str(path), port=7000), TOKEN)
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_agent_says_who_and_how_it_is(guest: GuestClient) -> None:
    health = await guest.health()
    assert (health.protocol, health.init) == (1, "agent")
    assert health.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_figures_are_those_of_the_kernel(guest: GuestClient) -> None:
    stats = await guest.stats()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert stats.memory.total_bytes == pytest.approx(total, rel=0.01)
    assert len(stats.load) == 3


async def test_listening_port_is_seen(guest: GuestClient) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        port = listening.getsockname()[1]
        seen = [(x.proto, x.address, x.pid) for x in await guest.ports() if x.port == port]
    # Somebody else may have this number at another address, or for UDP.
    assert seen.count(("tcp", "127.0.0.1", os.getpid())) == 1


async def test_port_is_dialled_and_its_first_words_are_the_callers(guest: GuestClient) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()

        async def greet() -> bytes:
            peer, _ = await loop.sock_accept(listener)
            with peer:
                await loop.sock_sendall(peer, b"hello")
                return await loop.sock_recv(peer, 10)

        greeting = asyncio.ensure_future(greet())
        with await guest.dial(port) as sock:
            assert await loop.sock_recv(sock, 5) == b"hello"
            await loop.sock_sendall(sock, b"bye")
            assert await greeting == b"bye"
    with pytest.raises(BangerError):
        await guest.dial(port)


async def test_error_of_the_agent_arrives_with_its_reason(guest: GuestClient) -> None:
    with pytest.raises(BangerError) as caught:
        await guest.reseed(b"x" * 64)
    assert (caught.value.code, caught.value.reason) == ("operation_failed", "unsupported")


async def test_method_that_does_not_exist_is_an_error(guest: GuestClient) -> None:
    with pytest.raises(BangerError) as caught:
        await guest.call("no.such", {}, dict)
    assert caught.value.code == "unknown_method"


def write_tree(out: BinaryIO) -> int:
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, size in (("a", 3), ("d/b", 3 << 20)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    return 2


async def test_tree_is_put_whole(guest: GuestClient, tmp_path: Path) -> None:
    target = tmp_path / "tree"
    written, received = await guest.put(str(target), write_tree)
    assert (written, received.files, received.bytes) == (2, 2, 3 + (3 << 20))
    assert (target / "a").read_bytes() == b"xxx"
    assert (target / "d" / "b").stat().st_size == 3 << 20


async def test_put_that_is_cancelled_leaves_the_old_tree(
    guest: GuestClient, tmp_path: Path
) -> None:
    target = tmp_path / "tree"
    target.mkdir()
    (target / "old").touch()
    writing = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(out: BinaryIO) -> None:
        member = tarfile.TarInfo("endless")
        member.size = 1 << 40
        out.write(member.tobuf())
        loop.call_soon_threadsafe(writing.set)
        while True:
            out.write(bytes(1 << 16))

    putting = asyncio.ensure_future(guest.put(str(target), endless))
    await writing.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    async with asyncio.timeout(PATIENCE_S):
        while sorted(os.listdir(tmp_path)) != ["tree"]:  # what it had unpacked beside
            await asyncio.sleep(0.005)
    assert os.listdir(target) == ["old"]


async def test_put_that_the_guest_refuses_gives_the_guests_words(
    guest: GuestClient, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BangerError, match="file"):
        await guest.put(str(tmp_path / "file" / "below"), write_tree)


async def test_writer_that_fails_is_not_hidden_and_leaves_nothing(
    guest: GuestClient, tmp_path: Path
) -> None:
    def fail(out: BinaryIO) -> None:
        out.write(b"half a header")
        raise BangerError("operation_failed", "the repository changed")

    with pytest.raises(BangerError, match="the repository changed"):
        await guest.put(str(tmp_path / "tree"), fail)
    async with asyncio.timeout(PATIENCE_S):
        while os.listdir(tmp_path):
            await asyncio.sleep(0.005)


async def test_agent_ends_when_it_is_asked_to(guest: GuestClient, agent: Agent) -> None:
    await guest.shutdown(grace_s=1, connect_s=PATIENCE_S)
    assert await asyncio.to_thread(agent.process.wait, PATIENCE_S) == 0


async def test_endpoint_where_nobody_listens_is_not_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, so nobody else; not listening, so refused
        for endpoint in (
            TcpEndpoint(address="127.0.0.1", port=port),
            VsockEndpoint(path=str(tmp_path / "none"), port=7000),
        ):
            with pytest.raises(BangerError, match="connecting to the guest agent") as caught:
                await GuestClient(endpoint, TOKEN).health()
            assert caught.value.reason == "guest_not_ready"


async def test_vmm_that_refuses_the_port_is_not_ready(tmp_path: Path) -> None:
    """Firecracker closes the connection when nobody listens in the guest."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_unix_server(refuse, path=str(tmp_path / "v"))
    with pytest.raises(BangerError, match="nobody listens"):
        await GuestClient(VsockEndpoint(path=str(tmp_path / "v"), port=7000), TOKEN).health()
    server.close()
