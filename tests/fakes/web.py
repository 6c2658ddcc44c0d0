"""A static web server in this process that can misbehave, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from patience import PATIENCE_S


@dataclass
class Web:
    """Serves the files of `root`. Its state is public: tests set what they need."""

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Path and range of each request."""
    replaced: dict[str, bytes] = field(default_factory=dict)
    """What is sent in place of the file of this name."""
    missing: set[str] = field(default_factory=set)
    cut_after: int | None = None
    """Bytes after which each transfer is cut."""
    ranges: bool = True
    announce: int | None = None
    """Content-Length, whatever there is."""
    hold: threading.Event | None = None
    """Bodies are held back in their middle until this is set."""
    holding: threading.Event = field(default_factory=threading.Event)
    statuses: list[int] = field(default_factory=list)
    """Answers given first, one per request."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        wanted = request.headers.get("Range", "")
        self.asked.append(f"{name} {wanted}".rstrip())
        path = self.root / name
        if self.statuses:
            self._end(request, self.statuses.pop(0))
            return
        if name in self.missing or (name not in self.replaced and not path.is_file()):
            self._end(request, 404)
            return
        data = self.replaced.get(name) or path.read_bytes()
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start and self.ranges:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            data = data[start:]
        else:
            request.send_response(200)
        length = len(data) if self.announce is None else self.announce
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if self.hold is not None:
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            self.holding.set()
            self.hold.wait(PATIENCE_S)
            data = data[len(data) // 2 :]
        with contextlib.suppress(OSError):  # whoever was held may have gone
            request.wfile.write(data[: self.cut_after])
        # Else whoever expects more would wait for it.
        request.close_connection = self.cut_after is not None or self.announce is not None

    def _end(self, request: BaseHTTPRequestHandler, status: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()


@contextmanager
def serving(root: Path) -> Iterator[Web]:
    """A server on loopback until the block is left."""
    web = Web(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
