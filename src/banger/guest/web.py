"""Whether a port of a guest speaks HTTP: a bounded guess, so that a link can be shown for it.

One request for the headers of `/`, and once more inside TLS where the answer looks like that of a
TLS server. Nothing is kept; what the guest answers is only compared with the beginning of a status
line (RFC 9112 §4) or of a TLS alert (RFC 8446 §6).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Literal

from banger.errors import BangerError

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable

Scheme = Literal["http", "https"]

_STATUS_LINE = b"HTTP/"
_ALERT = b"\x15\x03"
# "HTTP/1.1 400 Bad Request" is what servers say to plain HTTP on a TLS port.
_BAD_REQUEST = b" 400"
_LOOKED_AT = 12
_CLOSE_S = 1.0


async def find_scheme(
    connect: Callable[[], Awaitable[socket.socket]], host: str, *, timeout_s: float
) -> Scheme | None:
    """How a port is reached by a browser; None: not at all, or not within `timeout_s`.

    `connect` makes a new non-blocking connection to it; `host` is the name in the request.
    """
    found: Scheme | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            plain = await _ask(connect, host, None)
            if plain.startswith(_STATUS_LINE):
                found = "http"
                if plain[8:12] != _BAD_REQUEST:
                    return found
            elif plain and not plain.startswith(_ALERT):
                return None  # another protocol, whose server speaks first or complains
            if (await _ask(connect, host, _anybody())).startswith(_STATUS_LINE):
                found = "https"
    return found


def _anybody() -> ssl.SSLContext:
    """Whose certificate it is does not matter: nothing secret is said and nothing believed."""
    import ssl  # OpenSSL takes long to load, and most daemons never look at a port

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _ask(
    connect: Callable[[], Awaitable[socket.socket]], host: str, tls: ssl.SSLContext | None
) -> bytes:
    """The first bytes of the answer; empty where there is none."""
    try:
        sock = await connect()
    except BangerError:
        return b""
    try:
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        if tls is not None:
            await writer.start_tls(tls, server_hostname=host.partition(":")[0])
        writer.write(
            f"HEAD / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: banger\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        return await reader.readexactly(_LOOKED_AT)
    except asyncio.IncompleteReadError as e:
        return e.partial
    except OSError:  # ssl.SSLError is one
        return b""
    finally:
        # At once, without a goodbye that the other side could draw out.
        writer.transport.abort()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await writer.wait_closed()
