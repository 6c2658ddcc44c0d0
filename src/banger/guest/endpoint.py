"""Where a guest's agent is reached, and how a connection to it is made.

An endpoint is a value: it is kept in a VM's handles and survives the daemon.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from banger.api.base import Wire
from banger.errors import BangerError
from banger.rpc.unix import short_path

_HANDSHAKE_LIMIT = 64
_GONE_MS = 120_000


class VsockEndpoint(Wire, frozen=True, kw_only=True, tag_field="kind", tag="vsock-uds"):
    """A Unix socket that leads into the guest after `CONNECT <port>`.

    Source: Firecracker, docs/vsock.md.
    """

    path: str
    port: int


class TcpEndpoint(Wire, frozen=True, kw_only=True, tag_field="kind", tag="tcp"):
    """An address on the bridge, or a loopback port that QEMU forwards."""

    address: str
    port: int


Endpoint = VsockEndpoint | TcpEndpoint


async def connect(endpoint: Endpoint, *, timeout_s: float) -> socket.socket:
    """A connected, non-blocking stream to the agent. The caller closes it.

    Raises:
        BangerError: operation_failed, reason guest_not_ready: nobody answers within `timeout_s`.
    """
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(endpoint, TcpEndpoint):
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                await asyncio.get_running_loop().sock_connect(
                    sock, (endpoint.address, endpoint.port)
                )
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A guest that vanished sends no reset: give up on it some time, tcp(7). Whoever
                # can see the VMM's end watches that, which is quicker.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_MS)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            else:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                await _connect_vsock(sock, Path(endpoint.path), endpoint.port)
        return sock
    except (OSError, TimeoutError) as e:
        if sock is not None:
            sock.close()
        why = "no answer in time" if isinstance(e, TimeoutError) else e.strerror or str(e)
        raise BangerError(
            "operation_failed",
            f"connecting to the guest agent: {why}",
            hint="banger vm logs VM",
            reason="guest_not_ready",
        ) from e
    except BaseException:
        if sock is not None:
            sock.close()
        raise


async def _connect_vsock(sock: socket.socket, path: Path, port: int) -> None:
    loop = asyncio.get_running_loop()
    with short_path(path) as name:
        await loop.sock_connect(sock, name)
    await loop.sock_sendall(sock, b"CONNECT %d\n" % port)
    # Byte by byte: what follows the line belongs to the agent's protocol.
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _HANDSHAKE_LIMIT:
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            raise ConnectionResetError(None, "the VMM refused the connection: nobody listens")
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionResetError(None, f"the VMM answered {answer!r}")
