"""What listens inside a guest, and how this host reaches it. Looks; changes nothing.

The guest says what it likes: names are made harmless, addresses and ports are checked, and the
number of connections that are tried is bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from banger.api.results import PortRow
from banger.guest.endpoint import TcpEndpoint, connect
from banger.guest.web import find_scheme

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from banger.api.records import VmRecord
    from banger.guest.client import GuestClient, Listener
    from banger.vm.context import VmContext

_PROBES = 64
_AT_ONCE = 16
_PROBE_S = 2.5
_PROBES_S = 5.0
# Never HTTP, and a server that logs every stranger.
_SSH_PORT = 22


async def ports(ctx: VmContext, vm: VmRecord) -> list[PortRow]:
    """Listening sockets of a running guest, sorted by port.

    Where one program listens on a port at several addresses, the one that this host reaches counts.

    Raises:
        BangerError: not_running, or the agent does not answer.
    """
    client = ctx.client(vm)
    rows: dict[tuple[str, int, str], PortRow] = {}
    for listener in await client.ports():
        row = build_row(vm, listener)
        key = (row.proto, row.port, row.process)
        if row.port and (key not in rows or (row.reachable and not rows[key].reachable)):
            rows[key] = row
    found = sorted(rows.values(), key=lambda r: (r.port, r.proto, r.process))
    return await _with_schemes(vm, client, found)


def build_row(vm: VmRecord, listener: Listener) -> PortRow:
    """One row of the table, without what only a connection can tell."""
    process = printable(listener.process)
    address = printable(listener.address)
    reachable = reached(vm, listener)
    inside = f"[{address}]" if ":" in address else address
    if reachable:
        endpoint, fix = f"{vm.name}.vm:{listener.port}", None
    else:
        endpoint, fix = f"{inside}:{listener.port}", _way_in(vm, listener, inside)
    return PortRow(
        vm=vm.name,
        port=listener.port,
        proto=listener.proto,
        process=process,
        address=address,
        endpoint=endpoint,
        reachable=reachable,
        fix=fix,
    )


def reached(vm: VmRecord, listener: Listener) -> bool:
    """Whether what this host sends to the guest's address arrives; wildcards of both families take
    it, on user-mode networking nothing does."""
    try:
        address = ipaddress.ip_address(listener.address)
    except ValueError:
        return False
    return bool(vm.address) and (address.is_unspecified or str(address) == vm.address)


def _way_in(vm: VmRecord, listener: Listener, inside: str) -> str:
    tunnel = ""
    if listener.proto == "tcp":
        wildcard = inside in ("0.0.0.0", "[::]")
        target = "localhost" if wildcard else inside
        tunnel = f"ssh -L {listener.port}:{target}:{listener.port} {vm.name}.vm"
    if not vm.address:
        return tunnel or "user-mode networking lets no datagrams in"
    return "listen on 0.0.0.0" + (f", or: {tunnel}" if tunnel else "")


def printable(text: str) -> str:
    """A guest's string, harmless on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:64])


async def _with_schemes(vm: VmRecord, client: GuestClient, rows: list[PortRow]) -> list[PortRow]:
    """The rows with scheme and link where a connection tells them in time."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def look(row: PortRow) -> PortRow:
        to_port: Callable[[], Awaitable[socket.socket]]
        if vm.address:
            endpoint = TcpEndpoint(address=vm.address, port=row.port)
            to_port = partial(connect, endpoint, timeout_s=_PROBE_S)
        else:
            to_port = partial(client.dial, row.port)
        host = f"{vm.name}.vm:{row.port}"
        async with room:
            scheme = await find_scheme(to_port, host, timeout_s=_PROBE_S)
        if scheme is None:
            return row
        link = f"{scheme}://{_without_default(scheme, host)}/" if row.reachable else None
        return msgspec.structs.replace(row, scheme=scheme, link=link)

    wanted = [i for i, row in enumerate(rows) if _worth_a_look(vm, row)]
    looks = {i: asyncio.ensure_future(look(rows[i])) for i in wanted[:_PROBES]}
    if not looks:
        return rows
    try:
        await asyncio.wait(looks.values(), timeout=_PROBES_S)
    finally:
        for task in looks.values():
            task.cancel()
        await asyncio.gather(*looks.values(), return_exceptions=True)
    seen = {i: t.result() for i, t in looks.items() if not t.cancelled() and not t.exception()}
    return [seen.get(i, row) for i, row in enumerate(rows)]


def _worth_a_look(vm: VmRecord, row: PortRow) -> bool:
    # Through the agent every port that localhost has in the guest is reached.
    return (
        row.proto == "tcp"
        and row.port != _SSH_PORT
        and (row.reachable or (not vm.address and row.address in ("0.0.0.0", "::", "127.0.0.1")))
    )


def _without_default(scheme: str, host: str) -> str:
    return host.removesuffix(":80" if scheme == "http" else ":443")
