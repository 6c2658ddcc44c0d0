"""A registry in this process that can misbehave, and that remembers what it was asked."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from oci_kit import MANIFEST_TYPE, Image, sha256
from patience import PATIENCE_S

TOKEN = "t0ken-of-the-fake"


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


@dataclass
class FakeRegistry:
    """Its state is public: tests set what they need, before or between requests."""

    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    # Misbehaviour
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answers given first, one per request."""
    cut_after: int | None = None
    """Bytes after which each transfer of a blob is cut."""
    no_ranges: bool = False
    no_head: bool = False
    replaced: dict[str, bytes] = field(default_factory=dict)
    """What is sent in place of a blob or manifest of this digest."""
    announce: int | str | None = None
    """Content-Length of blobs, whatever they have."""
    redirect: str | None = None
    """Where requests for blobs are sent; `{name}` becomes the digest."""
    realm: str | None = None
    """Bearer tokens are demanded, and got here."""
    login: tuple[str, str] | None = None
    """The login that the token service, or without `realm` the registry itself, demands."""
    gone: set[str] = field(default_factory=set)
    """Blobs that it does not have (any more)."""
    hold: threading.Event | None = None
    """Blobs are held back in their middle until this is set."""
    holding: threading.Event = field(default_factory=threading.Event)

    def add(self, image: Image, tag: str = "latest", *, digest: str | None = None) -> None:
        self.blobs.update(image.blobs)
        self.types[image.manifest] = MANIFEST_TYPE
        self.tags[tag] = digest or image.manifest

    def add_index(self, index: dict[str, Any], tag: str) -> str:
        data = json.dumps(index).encode()
        self.blobs[sha256(data)] = data
        self.types[sha256(data)] = index["mediaType"]
        self.tags[tag] = sha256(data)
        return sha256(data)

    def count(self, part: str) -> int:
        return sum(part in a.path for a in self.asked)


@contextmanager
def fake_registry(tls: ssl.SSLContext | None = None) -> Iterator[FakeRegistry]:
    """A registry on a loopback port, until the block is left; with TLS where a context is given."""
    fake = FakeRegistry()

    class Handler(_Handler):
        registry = fake

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        # The handshake is the connection's thread's business, not the accepting one's.
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    fake.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        if fake.hold is not None:
            fake.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    registry: FakeRegistry
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def handle(self) -> None:
        try:
            super().handle()
        except (ssl.SSLError, ConnectionError):
            pass  # a client that does not trust us, or has gone

    def do_HEAD(self) -> None:
        self._handle(body=False)

    def do_GET(self) -> None:
        self._handle(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self._handle(body=True)

    def _handle(self, *, body: bool) -> None:
        r = self.registry
        headers = {k.lower(): v for k, v in self.headers.items()}
        r.asked.append(Asked(self.command, self.path, headers))
        if self.path.startswith("/token"):
            self._token()
            return
        if r.statuses:
            status, extra = r.statuses.pop(0)
            self._send(status, b"", extra)
            return
        if not self._is_known(headers):
            return
        name = self.path.rsplit("/", 1)[-1]
        if "/manifests/" in self.path:
            if r.no_head and not body:
                self._send(405, b"")
                return
            digest = r.tags.get(name, name)
            data = r.blobs.get(digest)
            if data is None:
                self._send(404, b"{}")
                return
            kind = r.types.get(digest, MANIFEST_TYPE)
            self._send(
                200, r.replaced.get(digest, data),
                {"Content-Type": kind, "Docker-Content-Digest": digest}, body=body,
            )  # fmt: skip
        elif "/blobs/" in self.path and r.redirect:
            self._send(307, b"", {"Location": r.redirect.format(name=name)})
        elif "/blobs/" in self.path or "/elsewhere/" in self.path:
            self._blob(name, headers)
        else:
            self._send(200, b"{}")

    def _is_known(self, headers: dict[str, str]) -> bool:
        r = self.registry
        got = headers.get("authorization", "")
        if r.realm:
            if got == f"Bearer {TOKEN}":
                return True
            self._send(401, b"", {"WWW-Authenticate": f'Bearer realm="{r.realm}",service="fake"'})
            return False
        if r.login and got != _basic(r.login):
            self._send(401, b"", {"WWW-Authenticate": 'Basic realm="fake"'})
            return False
        return True

    def _token(self) -> None:
        r = self.registry
        if r.login and self.headers.get("Authorization") != _basic(r.login):
            self._send(401, b"{}")
        else:
            self._send(200, json.dumps({"token": TOKEN}).encode())

    def _blob(self, name: str, headers: dict[str, str]) -> None:
        r = self.registry
        digest = name.partition("?")[0]  # signed addresses have a query
        if digest in r.gone:
            self._send(404, b"{}")
            return
        data = r.replaced.get(digest, r.blobs.get(digest, b""))
        start = 0
        if (wanted := headers.get("range")) and not r.no_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        length = len(data) - start if r.announce is None else r.announce
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        rest = data[start:]
        if r.hold is not None and rest:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            r.holding.set()
            r.hold.wait(PATIENCE_S)
            rest = rest[len(rest) // 2 :]
        try:
            self.wfile.write(rest if r.cut_after is None else rest[: r.cut_after])
        except OSError:
            self.close_connection = True
        if (r.cut_after is not None and len(rest) > r.cut_after) or length != len(data) - start:
            self.close_connection = True

    def _send(
        self, status: int, data: bytes, extra: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode()
