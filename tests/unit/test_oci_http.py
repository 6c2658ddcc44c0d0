"""Proxies, certificates, waits: what surrounds each request."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from banger.disk.background import Job
from banger.errors import BangerError
from banger.oci.http import BrokenTransfer, Http, explain, find_proxy, place, retry_after_s
from banger.oci.reference import RegistryReference, is_loopback
from banger.oci.registry import RegistrySource
from banger.oci.transfer import Meter, Stalled, Watch
from fakes.registry import FakeRegistry, fake_registry
from oci_kit import Entry, build_image, layer_tar
from patience import PATIENCE_S

NAME = "registry.invalid"


@dataclass
class Proxy:
    """A proxy that tunnels every name to one port of this host."""

    address: str
    asked: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    root = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    crt, pem = root / "ca.crt", root / "key.pem"
    crt.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return crt, pem


@pytest.fixture
def registry(certificate: tuple[Path, Path]) -> Iterator[FakeRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with fake_registry(context) as fake:
        fake.add(build_image([layer_tar([Entry("a")])]))
        yield fake


@pytest.fixture
def proxy(registry: FakeRegistry) -> Iterator[Proxy]:
    port = int(registry.host.rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", 0))
    found = Proxy(f"127.0.0.1:{listener.getsockname()[1]}")

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    sockets = [listener]
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *args: socket.socket) -> None:
        threads.append(threading.Thread(target=work, args=args))
        threads[-1].start()

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            sockets.append(client)
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(4096)):
                head += data
            found.asked.append(head)
            server = socket.create_connection(("127.0.0.1", port))
            sockets.append(server)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            start(pump, client, server)
            start(pump, server, client)

    start(serve)
    yield found
    for s in sockets:
        with contextlib.suppress(OSError):
            s.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(PATIENCE_S)
    for s in sockets:
        s.close()


def digest(host: str, tmp_path: Path) -> str:
    job = Job()
    reference = RegistryReference(registry=host, repository="app", tag="latest", digest=None)
    with RegistrySource(
        reference,
        blobs=tmp_path / "blobs" / "sha256",
        work=job,
        http=Http(job, first_pause_s=0.01),
        docker_config=tmp_path / "none",
    ) as source:
        return source.digest


def test_a_registry_with_a_private_ca_is_reached_through_a_proxy(
    tmp_path: Path,
    registry: FakeRegistry,
    proxy: Proxy,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("https_proxy", f"http://user:secret@{proxy.address}")
    assert digest(NAME, tmp_path) == registry.tags["latest"]
    assert proxy.asked[0].startswith(f"CONNECT {NAME}:443 ".encode())
    assert b"proxy-authorization: basic" in proxy.asked[0].lower()


def test_a_certificate_that_nobody_signed_is_refused_by_name(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://user:secret@{proxy.address}")
    with pytest.raises(BangerError, match="certificate is not trusted") as caught:
        digest(NAME, tmp_path)
    assert f"through the proxy {proxy.address}" in caught.value.message
    assert "secret" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_named_without_its_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(BangerError, match=f"127.0.0.1:{port}") as caught:
        digest(NAME, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "proxies", "expected"),
    [
        ("a.example", {"https": "http://p:1"}, "http://p:1"),
        ("a.example", {"https": "p:1"}, "http://p:1"),
        ("a.example", {"http": "http://p:1"}, None),
        ("a.example", {"https": "http://p:1", "no": "example"}, None),
        ("a.example", {"https": "http://p:1", "no": ".example,other"}, None),
        ("a.example", {"https": "http://p:1", "no": "*"}, None),
        ("a.example", {"https": "http://p:1", "no": "b.example"}, "http://p:1"),
        ("127.0.0.1", {"https": "http://p:1"}, None),
        ("localhost", {"https": "http://p:1"}, None),
        ("a.example", {}, None),
    ],
)
def test_a_proxy_is_chosen_as_other_tools_choose_it(
    host: str, proxies: dict[str, str], expected: str | None
) -> None:
    assert find_proxy("https", host, host, proxies) == expected


@pytest.mark.parametrize("host", ["127.evil.example", "localhost.evil", "10.0.0.1", "", "[::1]"])
def test_only_this_host_is_this_host(host: str) -> None:
    assert not is_loopback(host)


def test_places_hide_queries_and_logins() -> None:
    assert place("https://u:p@a.example:5/x/y?sig=SECRET#f") == "https://a.example:5/x/y"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5", 5.0), (None, None), ("", None), ("soon", None), ("\xb2", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value) == expected


def test_a_trickle_is_no_transfer() -> None:
    now = 0.0
    watch = Watch(window_s=60, clock=lambda: now)
    with pytest.raises(Stalled, match="only 60 bytes came in 60 s"):
        for _ in range(60):
            now += 1
            watch.saw(1)


def test_a_document_that_comes_as_a_trickle_is_given_up() -> None:
    """A byte now and then would hold a pull for ever: no single wait is long."""
    asked = threading.Event()
    over = threading.Event()

    def trickle(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
            asked.set()
            with contextlib.suppress(OSError):
                while not over.wait(0.02):
                    client.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        http = Http(Job(), silence_s=0.4)
        try:
            where = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/x/manifests/latest"
            with (
                http.request("GET", where) as answer,
                pytest.raises(BrokenTransfer, match="bytes came in"),
            ):
                answer.text(1 << 20)
        finally:
            over.set()
            thread.join()
            http.close()
    assert asked.is_set()


def test_a_slow_transfer_is_one() -> None:
    now = 0.0
    watch = Watch(window_s=60, clock=lambda: now)
    for _ in range(300):
        now += 1
        watch.saw(2000)


def test_progress_shows_amount_and_rate_and_always_the_end() -> None:
    now = 0.0
    told: list[tuple[int, int | None, str]] = []
    meter = Meter(10 << 20, lambda *a: told.append(a), clock=lambda: now)
    for _ in range(100):
        now += 0.1
        meter.add((10 << 20) // 100)
    meter.add((10 << 20) - 100 * ((10 << 20) // 100))
    assert told[-1][:2] == (10 << 20, 10 << 20)
    assert "10M of 10M" in told[-1][2]
    assert "/s" in told[-1][2]
    assert len(told) < 50


def test_words_about_a_failure_hold_no_address() -> None:
    assert explain(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"
