"""The sockets of the name server: UDP and TCP on one loopback address and port.

Lives as long as the daemon. It holds no state of its clients but open TCP connections, which are
few, short, and closed when idle; when one too many comes, the one that was silent longest goes.

Source: RFC 1035 §4.2 (framing), RFC 7766 (several queries on a connection, closing idle ones).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING

from banger.dns.answer import respond
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.dns.zone import Zone

log = logging.getLogger(__name__)

_IDLE_S = 10.0
_MOST_CONNECTIONS = 64
# Datagrams handled before the loop's other work gets its turn.
_AT_ONCE = 64
_DATAGRAM_BYTES = 65535
# Free ports differ between UDP and TCP; only for port 0.
_ATTEMPTS = 16


class NameServer:
    """Answers for a zone. `start` once, `close` once."""

    def __init__(
        self, zone: Zone, *, idle_s: float = _IDLE_S, most_connections: int = _MOST_CONNECTIONS
    ) -> None:
        self.zone = zone
        self._idle_s = idle_s
        self._most = most_connections
        self._udp: socket.socket | None = None
        self._tcp: asyncio.Server | None = None
        self._closing = False
        self._connections: dict[_Connection, None] = {}
        """Ordered: the one that was silent longest first."""

    async def start(self, listen: str) -> tuple[str, int]:
        """Listen on `address:port` and return both; port 0 takes a free one.

        Raises:
            BangerError: bad_request: no loopback address with a port. operation_failed with reason
                in_use: somebody else has the port.
        """
        address, port = parse_listen(listen)
        try:
            udp, tcp = _bind(address, port)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise BangerError(
                    "operation_failed", f"listening for DNS queries on {listen}: {e.strerror}"
                ) from e
            raise BangerError(
                "operation_failed",
                f"listening for DNS queries on {listen}: somebody else listens there",
                hint=f"ss -lntup sport = :{port}",
                reason="in_use",
            ) from e
        loop = asyncio.get_running_loop()
        self._tcp = await loop.create_server(lambda: _Connection(self), sock=tcp)
        self._udp = udp
        loop.add_reader(udp, self._serve_datagrams, udp)
        return str(address), int(udp.getsockname()[1])

    async def close(self) -> None:
        """Stop answering; open connections are cut. Idempotent."""
        self._closing = True
        if self._udp is not None:
            asyncio.get_running_loop().remove_reader(self._udp)
            self._udp.close()
            self._udp = None
        if self._tcp is not None:
            self._tcp.close()
            for connection in list(self._connections):
                connection.abort()
            await self._tcp.wait_closed()
            self._tcp = None

    def _serve_datagrams(self, sock: socket.socket) -> None:
        # Without a transport: several datagrams for one turn of the loop, and no queue of replies.
        # One that the kernel has no room for is lost, as datagrams may be, and asked for again.
        zone = self.zone
        for _ in range(_AT_ONCE):
            try:
                query, peer = sock.recvfrom(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                log.debug("DNS: receiving: %s", e)
                return
            reply = respond(zone, query, udp=True)
            if reply is not None:
                with contextlib.suppress(OSError):
                    sock.sendto(reply, peer)

    def _opened(self, connection: _Connection) -> None:
        if self._closing:  # it was accepted just before
            connection.abort()
            return
        if len(self._connections) >= self._most:
            next(iter(self._connections)).abort()
        self._connections[connection] = None

    def _heard(self, connection: _Connection) -> None:
        """It asked something: to the end of the order."""
        if connection in self._connections:
            del self._connections[connection]
            self._connections[connection] = None

    def _closed(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)


class _Connection(asyncio.Protocol):
    """One TCP connection: any number of queries, each behind its length in two bytes."""

    def __init__(self, server: NameServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server._opened(self)
        self._rearm()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        while len(self._buffer) >= 2:
            end = 2 + int.from_bytes(self._buffer[:2], "big")
            if len(self._buffer) < end:
                break
            reply = respond(self._server.zone, bytes(self._buffer[2:end]), udp=False)
            del self._buffer[:end]
            if reply is None:
                self.abort()
                return
            self._transport.write(len(reply).to_bytes(2, "big") + reply)
            # Only a query counts: bytes that come one by one do not keep a connection open.
            self._server._heard(self)
            self._rearm()

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._server._idle_s, self.abort)

    def pause_writing(self) -> None:
        # A client that does not read its answers is not read either, until it is idle too long.
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def eof_received(self) -> bool:
        return False  # answers that are under way are still written

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server._closed(self)

    def abort(self) -> None:
        self._server._closed(self)
        if self._transport is not None:
            self._transport.abort()


def parse_listen(listen: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """`127.0.0.1:42069` or `[::1]:42069`, taken apart.

    Raises:
        BangerError: bad_request: anything else, an address that is not of loopback included.
    """
    host, _, digits = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        if address.is_loopback and digits.isascii() and digits.isdigit() and int(digits) < 65536:
            return address, int(digits)
    except ValueError:
        pass
    raise BangerError(
        "bad_request",
        f"dns_listen_addr {listen!r} is not allowed: a loopback address and a port, "
        "such as 127.0.0.1:42069",
    )


def _bind(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> tuple[socket.socket, socket.socket]:
    """A UDP and a TCP socket with the same port. Raises OSError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for attempt in range(_ATTEMPTS):
        with contextlib.ExitStack() as undo:
            udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            undo.callback(udp.close)
            udp.bind((str(address), port))
            tcp = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            undo.callback(tcp.close)
            # Connections of an earlier daemon linger in TIME_WAIT; a listener still excludes ours.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tcp.bind((str(address), udp.getsockname()[1]))
                # Two sockets may be bound with SO_REUSEADDR while neither listens.
                tcp.listen(_MOST_CONNECTIONS)
            except OSError as e:
                if port == 0 and e.errno == errno.EADDRINUSE and attempt + 1 < _ATTEMPTS:
                    continue
                raise
            undo.pop_all()
            return udp, tcp
    raise AssertionError  # the last attempt returned or raised
