"""Announcements: how the host learns, without polling, that a guest can run commands.

One TCP listener on the bridge address serves every VM with a tap; a Unix listener of its own serves
a VM with vsock or user-mode networking, for as long as its start lasts. A guest proves with its
token that it is the VM it says; nothing else it says is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import msgspec

from banger.api.base import Wire
from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.guest.config import ANNOUNCE_PORT
from banger.rpc.channel import Channel, accept
from banger.rpc.unix import short_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_EXCHANGE_S = 30.0
# linux/in.h: an address may be bound before the bridge that will have it exists.
_IP_FREEBIND = 15
_MOST_CONNECTIONS = 4


# Kept in records and printed: short, and nothing that a terminal would act on.
_Word = Annotated[str, msgspec.Meta(max_length=64, pattern=r"\A[A-Za-z0-9._+-]*\Z")]


class Announcement(Wire, frozen=True, kw_only=True):
    vm_id: _Word
    boot_id: _Word
    agent_version: _Word
    protocol: int


class Announcements:
    """Who is expected, and the listeners they come through. Lives as long as the daemon."""

    def __init__(self) -> None:
        self._expected: dict[str, tuple[str, asyncio.Future[Announcement]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tcp: tuple[str, socket.socket, asyncio.Task[None]] | None = None

    @contextlib.contextmanager
    def expect(self, vm_id: str, token: str) -> Iterator[asyncio.Future[Announcement]]:
        """A future that the announcement of this VM completes."""
        future: asyncio.Future[Announcement] = asyncio.get_running_loop().create_future()
        self._expected[vm_id] = (token, future)
        try:
            yield future
        finally:
            del self._expected[vm_id]
            future.cancel()

    def ensure_tcp(self, address: str) -> None:
        """Listen on the bridge address, which need not exist yet.

        Raises:
            BangerError: the port is taken.
        """
        if self._tcp is not None and self._tcp[0] == address:
            return
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        try:
            sock.bind((address, ANNOUNCE_PORT))
        except OSError as e:
            sock.close()
            raise BangerError(
                "operation_failed",
                f"listening for guests on {address}:{ANNOUNCE_PORT}: {e.strerror}",
                hint=f"ss -ltnp sport = :{ANNOUNCE_PORT}",
            ) from e
        sock.listen(64)
        self._tcp = (address, sock, self._spawn(self._serve(sock)))

    @contextlib.contextmanager
    def listen_unix(self, path: Path) -> Iterator[None]:
        """Listen on a Unix socket (0600, in a private directory) while the context lasts."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with short_path(path) as name:
            sock.bind(name)
        sock.listen(4)
        task = self._spawn(self._serve(sock))
        try:
            yield
        finally:
            task.cancel()
            # The cancelled accept leaves the selector only in the loop's next turn; a socket that
            # gets the same number before that would never be watched.
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]  # coroutine of None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, sock: socket.socket) -> None:
        # By peer address, so that one guest cannot keep the others out; the bridge lets nobody
        # forge one. A Unix listener has a single guest behind it.
        greeted: Counter[str] = Counter()
        while True:
            connection = await accept(sock)
            try:
                name = connection.getpeername()
            except OSError:  # it has left already
                connection.close()
                continue
            peer = name[0] if isinstance(name, tuple) else ""
            if greeted[peer] >= _MOST_CONNECTIONS:
                connection.close()
                continue
            greeted[peer] += 1
            self._spawn(self._greet(connection, peer, greeted))

    async def _greet(self, connection: socket.socket, peer: str, greeted: Counter[str]) -> None:
        channel = Channel(connection)
        try:
            async with asyncio.timeout(_EXCHANGE_S):
                line = await channel.read_line()
                if line is None:
                    return
                future, announcement = self._check(line)
                await channel.write_document({"result": {"time_unix_ns": time.time_ns()}})
                # The second line says that the clock is right; only now may commands run.
                if await channel.read_line() is not None and not future.done():
                    future.set_result(announcement)
        except (BangerError, TimeoutError, *MALFORMED) as e:
            log.warning("an announcement was refused: %s", e)
        finally:
            channel.close()
            greeted[peer] -= 1
            if not greeted[peer]:
                del greeted[peer]

    def _check(self, line: bytes) -> tuple[asyncio.Future[Announcement], Announcement]:
        request = decode_json(line, type=Request)
        announcement = decode_json(request.params, type=Announcement)
        expected = self._expected.get(announcement.vm_id)
        if expected is None:
            raise BangerError("unauthorized", "the VM is not expected")
        token, future = expected
        # As bytes: of strings it takes ASCII only.
        if not hmac.compare_digest(token.encode(), (request.token or "").encode()):
            raise BangerError("unauthorized", "wrong token")
        if announcement.protocol != PROTOCOL_VERSION:
            raise BangerError("bad_version", f"the agent speaks protocol {announcement.protocol}")
        return future, announcement

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tcp is not None:
            self._tcp[1].close()
