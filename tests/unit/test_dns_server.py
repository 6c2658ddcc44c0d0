"""The name server's sockets, asked by dnspython and by dig."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Network

import dns.asyncquery
import dns.message
import dns.rcode
import pytest
import pytest_asyncio

from banger.dns.server import NameServer, parse_listen
from banger.dns.zone import Zone
from banger.errors import BangerError
from patience import PATIENCE_S

Served = tuple[NameServer, str, int]


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    zone = Zone(IPv4Network("172.16.0.0/24"))
    zone.publish("web", "172.16.0.2")
    server = NameServer(zone, idle_s=PATIENCE_S, most_connections=4)
    host, port = await server.start("127.0.0.1:0")
    yield server, host, port
    await server.close()


def query(name: str = "web.vm", rtype: str = "A") -> dns.message.Message:
    return dns.message.make_query(name, rtype)


def framed(message: dns.message.Message) -> bytes:
    wire = message.to_wire()
    return struct.pack("!H", len(wire)) + wire


async def read_reply(reader: asyncio.StreamReader) -> dns.message.Message:
    (size,) = struct.unpack("!H", await reader.readexactly(2))
    return dns.message.from_wire(await reader.readexactly(size))


@pytest.mark.asyncio
async def test_udp_and_tcp_say_the_same(served: Served) -> None:
    _, host, port = served
    for transport in (dns.asyncquery.udp, dns.asyncquery.tcp):
        reply = await transport(query(), host, port=port, timeout=PATIENCE_S)
        assert str(reply.answer[0]) == "web.vm. 5 IN A 172.16.0.2"


@pytest.mark.asyncio
async def test_a_connection_takes_several_queries_also_in_pieces(served: Served) -> None:
    _, host, port = served
    reader, writer = await asyncio.open_connection(host, port)
    questions = [query(), query("no.vm"), query("web.vm", "AAAA")]
    stream = b"".join(framed(q) for q in questions)
    for i in range(len(stream)):
        writer.write(stream[i : i + 1])
        await writer.drain()
    for question in questions:
        assert question.is_response(await read_reply(reader))
    writer.write(framed(query()))
    writer.write_eof()
    assert (await read_reply(reader)).answer
    assert await reader.read() == b""
    writer.close()


@pytest.mark.asyncio
async def test_what_is_no_query_ends_its_connection_only(served: Served) -> None:
    _, host, port = served
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"\0\3abc")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    assert (await dns.asyncquery.tcp(query(), host, port=port, timeout=PATIENCE_S)).answer


@pytest.mark.asyncio
async def test_junk_datagrams_stop_nothing(served: Served) -> None:
    _, host, port = served
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for junk in (b"", b"\0" * 5, b"\xff" * 600, bytes(65000)):
            sock.sendto(junk, (host, port))
    assert (await dns.asyncquery.udp(query(), host, port=port, timeout=PATIENCE_S)).answer


@pytest.mark.asyncio
async def test_a_silent_connection_is_closed() -> None:
    server = NameServer(Zone(IPv4Network("172.16.0.0/24")), idle_s=0.05)
    host, port = await server.start("127.0.0.1:0")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"\0")  # a beginning of a query is none
    try:
        assert await reader.read() == b""
    except ConnectionResetError:
        pass
    writer.close()
    await server.close()


@pytest.mark.asyncio
async def test_one_connection_too_many_ends_the_one_that_was_silent_longest(
    served: Served,
) -> None:
    _, host, port = served
    opened = []
    for _ in range(4):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(framed(query()))
        await read_reply(reader)
        opened.append((reader, writer))
    opened[0][1].write(framed(query()))  # the second is the silent one now
    await read_reply(opened[0][0])
    fifth = await asyncio.open_connection(host, port)
    fifth[1].write(framed(query()))
    await read_reply(fifth[0])
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await opened[1][0].readexactly(1)
    for reader, writer in (opened[0], *opened[2:], fifth):
        writer.write(framed(query()))
        await read_reply(reader)
    for _, writer in (*opened, fifth):
        writer.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_a_taken_port_is_told_with_the_command_that_names_its_holder(
    kind: socket.SocketKind,
) -> None:
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            holder.listen()
        port = holder.getsockname()[1]
        server = NameServer(Zone(IPv4Network("172.16.0.0/24")))
        with pytest.raises(BangerError) as caught:
            await server.start(f"127.0.0.1:{port}")
        await server.close()
    assert caught.value.reason == "in_use"
    assert caught.value.hint == f"ss -lntup sport = :{port}"


@pytest.mark.asyncio
async def test_a_closed_server_gives_its_port_back_with_connections_open(served: Served) -> None:
    server, host, port = served
    _, writer = await asyncio.open_connection(host, port)
    await server.close()
    await server.close()
    again = NameServer(server.zone)
    assert await again.start(f"{host}:{port}") == (host, port)
    assert (await dns.asyncquery.udp(query(), host, port=port, timeout=PATIENCE_S)).answer
    await again.close()
    writer.close()


@pytest.mark.parametrize(
    "listen",
    ["", "42069", "127.0.0.1", "0.0.0.0:53", "172.16.0.1:53", "localhost:53", "127.0.0.1:65536",
     "127.0.0.1:-1", "127.0.0.1:x", "127.0.0.1:٣"],
)  # fmt: skip
def test_only_a_loopback_address_with_a_port_is_listened_on(listen: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_listen(listen)
    assert caught.value.code == "bad_request"


def test_loopback_of_both_families_is_understood() -> None:
    assert [str(x) for x in parse_listen("127.0.0.1:42069")] == ["127.0.0.1", "42069"]
    assert [str(x) for x in parse_listen("[::1]:53")] == ["::1", "53"]


@pytest.mark.asyncio
async def test_dig_reads_it_without_complaint(served: Served) -> None:
    _, host, port = served
    program = shutil.which("dig")
    if program is None:
        pytest.skip("dig is not installed here")

    async def dig(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            program, f"@{host}", "-p", str(port), *words, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out.decode()

    assert await dig("+short", "web.vm") == "172.16.0.2\n"
    assert await dig("+short", "+tcp", "WEB.vm") == "172.16.0.2\n"
    assert await dig("+short", "-x", "172.16.0.2") == "web.vm.\n"
    words = await dig("+norecurse", "nobody.vm", "SOA")
    assert "status: NXDOMAIN" in words
    assert "WARNING" not in words
