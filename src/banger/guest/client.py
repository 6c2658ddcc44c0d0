"""Calls to the guest agent. The guest is hostile: every reply has a size and a time limit.

A client holds no connection: each call makes one and closes it, except `open`, which gives a
connected socket away.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec

from banger.api.base import Wire
from banger.api.envelope import PROTOCOL_VERSION, Request, WireError
from banger.decoding import convert
from banger.errors import BangerError
from banger.guest.endpoint import Endpoint, connect
from banger.rpc.blocking import BlockingChannel
from banger.rpc.channel import Channel, connection_lost, decode_reply
from banger.rpc.data import DataWriter, decode
from banger.rpc.frames import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_CONNECT_S = 5.0
_CALL_S = 15.0
_ITEMS = 4096
_REPLY_LINE = 4096


# What a guest says of itself is printed: short, and no control character.
_Text = Annotated[str, msgspec.Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]


class Health(Wire, frozen=True, kw_only=True):
    agent_version: _Text
    protocol: int
    boot_id: _Text
    uptime_s: float
    hostname: _Text
    init: _Text
    init_state: _Text = ""
    first_boot: _Text = ""
    """How the installation of an sshd goes: running, done, failed; nothing where none is due."""


class Listener(Wire, frozen=True, kw_only=True):
    """`process` is what the process calls itself: any characters may be in it."""

    proto: Literal["tcp", "udp"]
    address: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    pid: int = 0
    process: str = ""


class Memory(Wire, frozen=True, kw_only=True):
    total_bytes: int
    available_bytes: int


class Filesystem(Wire, frozen=True, kw_only=True):
    path: _Text
    total_bytes: int
    free_bytes: int


class GuestStats(Wire, frozen=True, kw_only=True):
    """They are kept in the VM's record, so they have an end: an agent has a few filesystems."""

    uptime_s: float
    load: tuple[float, float, float]
    memory: Memory
    filesystems: Annotated[tuple[Filesystem, ...], msgspec.Meta(max_length=16)] = ()


class Activity(Wire, frozen=True, kw_only=True):
    """Who uses a guest: calls of its agent that last, sessions that run, ssh connections."""

    streams: int
    sessions: int
    ssh: int


class Transferred(Wire, frozen=True, kw_only=True):
    """What a put or get moved."""

    files: int
    bytes: int


class _Ports(Wire, frozen=True, kw_only=True):
    listeners: tuple[Listener, ...] = ()


class GuestClient:
    """The agent of one VM, reached at `endpoint` with the VM's token."""

    def __init__(self, endpoint: Endpoint, token: str) -> None:
        self._endpoint = endpoint
        self._token = token

    def request(self, method: str, params: dict[str, Any]) -> Request:
        return Request(
            version=PROTOCOL_VERSION,
            method=method,
            params=msgspec.Raw(msgspec.json.encode(params)),
            token=self._token,
        )

    async def open(self, *, timeout_s: float = _CONNECT_S) -> socket.socket:
        """A connected socket on which nothing was said yet; the caller owns it."""
        return await connect(self._endpoint, timeout_s=timeout_s)

    async def call(
        self,
        method: str,
        params: dict[str, Any],
        result: type[T],
        *,
        timeout_s: float = _CALL_S,
        connect_s: float = _CONNECT_S,
    ) -> T:
        """One call with one result.

        Raises:
            BangerError: the agent's own error; guest_not_ready; connection_lost; a reply that
                does not have the shape it must have.
        """
        doing = f"asking the guest agent for {method}"
        channel = Channel(await self.open(timeout_s=connect_s))
        try:
            async with asyncio.timeout(timeout_s):
                await _send(channel, self.request(method, params), doing)
                reply = decode_reply(await channel.read_line(), doing)
            return convert(reply.result, type=result)
        except TimeoutError as e:
            raise BangerError(
                "operation_failed",
                f"{doing}: no answer within {timeout_s:g} s",
                reason="guest_not_ready",
                outcome="unknown",
            ) from e
        except msgspec.ValidationError as e:
            raise BangerError("operation_failed", f"{doing}: malformed answer: {e}") from e
        finally:
            channel.close()

    async def health(self) -> Health:
        return await self.call("health", {}, Health)

    async def stats(self) -> GuestStats:
        return await self.call("stats", {}, GuestStats)

    async def activity(self) -> Activity:
        return await self.call("activity", {}, Activity)

    async def ports(self) -> tuple[Listener, ...]:
        """Listening sockets, at most 4096 of them."""
        return (await self.call("ports", {}, _Ports)).listeners[:_ITEMS]

    async def dial(self, port: int) -> socket.socket:
        """A connection to `port` on the guest's own loopback; the caller owns it.

        Raises:
            BangerError: nobody listens there, or as `call`.
        """
        doing = f"reaching port {port} in the guest"
        sock = await self.open()
        try:
            async with asyncio.timeout(_CALL_S):
                await Channel(sock).write_document(self.request("dial", {"port": port}))
                decode_reply(await _reply_line(sock), doing)
        except TimeoutError as e:
            sock.close()
            raise BangerError("operation_failed", f"{doing}: no answer") from e
        except BaseException:
            sock.close()
            raise
        return sock

    async def sync(self) -> None:
        await self.call("sync", {}, dict[str, Any], timeout_s=60)

    async def set_time(self, *, timeout_s: float = _CALL_S) -> None:
        """Set the guest's clock, where it is more than a second off, to ours."""
        await self.call(
            "time", {"unix_ns": time.time_ns()}, dict[str, Any],
            timeout_s=timeout_s, connect_s=timeout_s,
        )  # fmt: skip

    async def reseed(self, seed: bytes) -> None:
        await self.call("entropy", {"seed": base64.b64encode(seed).decode()}, dict[str, Any])

    async def shutdown(self, *, grace_s: float, connect_s: float) -> None:
        """Ask the guest to stop. It has answered when this returns; it ends some time later."""
        await self.call("shutdown", {"grace_s": grace_s}, dict[str, Any], connect_s=connect_s)

    async def put(
        self, path: str, write_tar: Callable[[BinaryIO], T], *, mode: str = "replace"
    ) -> tuple[T, Transferred]:
        """Send one tar stream that `write_tar` writes (in a worker thread) to the directory `path`.

        Cancelling closes the connection, so that the guest keeps its old tree and the writer
        fails at its next write.
        """
        sock = await self.open()
        sock.setblocking(True)
        work = asyncio.ensure_future(asyncio.to_thread(self._put, sock, path, mode, write_tar))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):  # the guest may have ended it already
                sock.shutdown(socket.SHUT_RDWR)
            await asyncio.gather(work, return_exceptions=True)
            raise
        finally:
            sock.close()

    def _put(
        self, sock: socket.socket, path: str, mode: str, write_tar: Callable[[BinaryIO], T]
    ) -> tuple[T, Transferred]:
        doing = f"copying files to {path} in the guest"
        channel = BlockingChannel(sock)
        try:
            channel.write_document(self.request("put", {"path": path, "mode": mode, "owner": None}))
            decode_reply(channel.read_line(), doing)
            try:
                with DataWriter(channel).buffered() as out:
                    written = write_tar(out)
                channel.write_frame(FrameType.DATA_END)
            except (BrokenPipeError, ConnectionResetError):
                # The agent gave up; its last frame says why.
                _final_frame(channel, doing)
                raise
            payload = _final_frame(channel, doing)
            return written, decode(payload, Transferred, doing)
        except OSError as e:
            if isinstance(e, ConnectionError):
                raise connection_lost(doing) from e
            raise BangerError("operation_failed", f"{doing}: {e.strerror or e}") from e


async def _send(channel: Channel, request: Request, doing: str) -> None:
    """Send a request. The agent acts on whole lines only, so one that was cut off did nothing."""
    try:
        await channel.write_document(request)
    except BangerError as e:
        raise BangerError(
            "operation_failed",
            f"{doing}: the connection was lost before it was asked",
            reason="connection_lost",
        ) from e


async def _reply_line(sock: socket.socket) -> bytes | None:
    """One line and not a byte more: what follows is not ours to read."""
    loop = asyncio.get_running_loop()
    line = b""
    while len(line) < _REPLY_LINE:
        try:
            byte = await loop.sock_recv(sock, 1)
        except OSError:
            return None
        if not byte:
            return None
        if byte == b"\n":
            return line
        line += byte
    return None


def _final_frame(channel: BlockingChannel, doing: str) -> bytes:
    while (frame := channel.read_frame()) is not None:
        kind, payload = frame
        if kind is FrameType.ERROR:
            raise decode(payload, WireError, doing).exception()
        if kind is FrameType.RESULT:
            return payload
    raise connection_lost(doing)
