"""What listens in a guest: the label of each listener, and the links that a probe finds."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from banger.api.records import VmRecord
from banger.errors import BangerError
from banger.guest.client import Listener
from banger.guest.endpoint import TcpEndpoint, connect
from banger.guest.web import find_scheme
from banger.vm.ports import build_row, ports
from fakes.world import World
from patience import PATIENCE_S

WEB = VmRecord(
    id="0" * 32, name="web", state="running", image_id="1" * 32, image="debian", kernel="k",
    vcpu=1, memory_mib=512, overlay_bytes=1, work_disk_bytes=1, address="172.16.0.2", mac="",
    network="bridge",
)  # fmt: skip
ALONE = VmRecord(
    id="0" * 32, name="web", state="running", image_id="1" * 32, image="debian", kernel="k",
    vcpu=1, memory_mib=512, overlay_bytes=1, work_disk_bytes=1, address="", mac="",
    network="user",
)  # fmt: skip


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "172.16.0.2"])
def test_wildcards_of_both_families_and_the_guests_address_are_reached(address: str) -> None:
    row = build_row(WEB, Listener(proto="tcp", address=address, port=8080, process="app"))
    assert (row.reachable, row.endpoint, row.fix) == (True, "web.vm:8080", None)


@pytest.mark.parametrize(
    ("address", "endpoint", "tunnel"),
    [
        ("127.0.0.1", "127.0.0.1:80", "ssh -L 80:127.0.0.1:80 web.vm"),
        ("127.0.0.53", "127.0.0.53:80", "ssh -L 80:127.0.0.53:80 web.vm"),
        ("::1", "[::1]:80", "ssh -L 80:[::1]:80 web.vm"),
        ("fe80::1", "[fe80::1]:80", "ssh -L 80:[fe80::1]:80 web.vm"),
        ("172.17.0.1", "172.17.0.1:80", "ssh -L 80:172.17.0.1:80 web.vm"),
    ],
)
def test_what_only_the_guest_reaches_is_marked_with_what_helps(
    address: str, endpoint: str, tunnel: str
) -> None:
    row = build_row(WEB, Listener(proto="tcp", address=address, port=80))
    assert (row.reachable, row.endpoint) == (False, endpoint)
    assert row.fix == f"listen on 0.0.0.0, or: {tunnel}"


def test_datagrams_have_no_tunnel() -> None:
    row = build_row(WEB, Listener(proto="udp", address="127.0.0.1", port=53))
    assert (row.reachable, row.fix) == (False, "listen on 0.0.0.0")
    assert build_row(WEB, Listener(proto="udp", address="0.0.0.0", port=53)).reachable


def test_user_mode_networking_reaches_nothing_but_through_a_tunnel() -> None:
    row = build_row(ALONE, Listener(proto="tcp", address="0.0.0.0", port=80))
    assert (row.reachable, row.fix) == (False, "ssh -L 80:localhost:80 web.vm")
    row = build_row(ALONE, Listener(proto="udp", address="0.0.0.0", port=80))
    assert row.fix == "user-mode networking lets no datagrams in"


def test_what_the_guest_says_is_harmless_on_a_terminal() -> None:
    odd = "\x1b[2J\u202e\n" + "x" * 200
    row = build_row(WEB, Listener(proto="tcp", address=odd, port=1, process=odd))
    text = row.process + row.address + row.endpoint + (row.fix or "")
    assert text.isprintable()
    assert len(row.process) == 64
    assert not row.reachable


# --- one row per service --------------------------------------------------------------------------


class Guest:
    """A client whose guest says what the test says; every port is somewhere on this host."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners
        self.dialled: list[int] = []

    async def ports(self) -> tuple[Listener, ...]:
        return self.listeners

    async def dial(self, port: int) -> socket.socket:
        self.dialled.append(port)
        raise BangerError("operation_failed", "nobody listens")


class Context:
    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def client(self, vm: VmRecord) -> Guest:
        return self.guest


def on(address: str, port: int, process: str = "app", proto: str = "udp") -> Listener:
    assert proto in ("tcp", "udp")
    return Listener(proto=proto, address=address, port=port, process=process)  # type: ignore[arg-type]  # narrowed


@pytest.mark.asyncio
async def test_one_service_is_one_row_and_the_reachable_address_counts() -> None:
    guest = Guest(
        on("127.0.0.1", 53), on("0.0.0.0", 53), on("::", 53), on("::1", 53),
        on("127.0.0.1", 53, "other"), on("0.0.0.0", 7), on("0.0.0.0", 0),
    )  # fmt: skip
    rows = await ports(Context(guest), WEB)  # type: ignore[arg-type]  # a fake
    assert [(x.port, x.process, x.address, x.reachable) for x in rows] == [
        (7, "app", "0.0.0.0", True),
        (53, "app", "0.0.0.0", True),
        (53, "other", "127.0.0.1", False),
    ]


@pytest.mark.asyncio
async def test_on_user_mode_networking_the_agent_is_asked_and_ssh_is_left_alone() -> None:
    guest = Guest(
        on("0.0.0.0", 80, proto="tcp"), on("127.0.0.1", 81, proto="tcp"),
        on("0.0.0.0", 22, proto="tcp"), on("0.0.0.0", 82), on("172.17.0.1", 83, proto="tcp"),
    )  # fmt: skip
    rows = await ports(Context(guest), ALONE)  # type: ignore[arg-type]  # a fake
    assert sorted(guest.dialled) == [80, 80, 81, 81]
    assert [x.link for x in rows] == [None] * 5


@pytest.mark.asyncio
async def test_a_guest_that_does_not_run_has_no_ports(world: World) -> None:
    vm = await world.create(start=False)
    with pytest.raises(BangerError) as caught:
        await ports(world.ctx, vm)
    assert caught.value.code == "not_running"


# --- the probe ------------------------------------------------------------------------------------

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(whole, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


def saying(words: bytes, *, first: bool = False) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first:
            if await reader.readexactly(4) != b"HEAD":
                return  # TLS, which this server does not know
            await reader.readuntil(b"\r\n\r\n")
        writer.write(words)
        await writer.drain()
        writer.write_eof() if writer.can_write_eof() else writer.close()
        await reader.read()

    return answer


def to(port: int) -> Callable[[], Awaitable[socket.socket]]:
    return lambda: connect(TcpEndpoint(address="127.0.0.1", port=port), timeout_s=PATIENCE_S)


async def scheme(port: int, timeout_s: float = PATIENCE_S) -> str | None:
    return await find_scheme(to(port), f"web.vm:{port}", timeout_s=timeout_s)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
    now = datetime.datetime.now(datetime.UTC)
    issued = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1).not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + issued.public_bytes(serialization.Encoding.PEM)
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


OK = saying(b"HTTP/1.1 404 Not Found\r\n\r\n")


@pytest.mark.asyncio
async def test_a_web_server_is_found_with_and_without_tls(certificate: ssl.SSLContext) -> None:
    async with serving(OK) as plain, serving(OK, certificate) as secret:
        assert await scheme(plain) == "http"
        assert await scheme(secret) == "https"


@pytest.mark.asyncio
async def test_a_server_that_refuses_the_request_is_a_web_server_all_the_same() -> None:
    async with serving(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert await scheme(port) == "http"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(saying(b"SSH-2.0-OpenSSH_9.2\r\n", first=True), id="speaks first"),
        pytest.param(saying(b"-ERR unknown command\r\n"), id="complains"),
        pytest.param(saying(b""), id="hangs up"),
        pytest.param(saying(b"\x15\x03\x01\0\2\2\x28"), id="an alert, but no TLS"),
        pytest.param(saying(b"\xff" * 100_000, first=True), id="floods"),
    ],
)
async def test_other_services_have_no_link(answer: Answer) -> None:
    async with serving(answer) as port:
        assert await scheme(port) is None


@pytest.mark.asyncio
async def test_a_silent_server_costs_its_time_and_no_more() -> None:
    heard = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        heard.set()

    async with serving(silent) as port:
        assert await scheme(port, timeout_s=0.1) is None
        await asyncio.wait_for(heard.wait(), PATIENCE_S)  # the connection was closed


@pytest.mark.asyncio
async def test_a_port_that_nobody_has_has_no_link() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert await scheme(unused.getsockname()[1]) is None


@pytest.mark.asyncio
async def test_a_link_is_shown_for_a_web_server() -> None:
    vm = msgspec.structs.replace(WEB, address="127.0.0.1")
    async with serving(OK) as port:
        guest = Guest(on("0.0.0.0", port, proto="tcp"), on("0.0.0.0", 22, proto="tcp"))
        ssh, row = await ports(Context(guest), vm)  # type: ignore[arg-type]  # a fake
    assert (row.scheme, row.link) == ("http", f"http://web.vm:{port}/")
    assert (ssh.scheme, ssh.link) == (None, None)
