"""HTTP for registries: proxies, certificates, redirects, retries, and waits that can be cancelled.

One `Http` serves one pull and is closed with it. What a server sends is never decoded, so that
digests fit, and every wait ends: by an answer, by 60 s of silence, or by the operation's end.

Source: RFC 9110 (redirects, Retry-After, Range); distribution-spec 1.1.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies_environment

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from banger import __version__
from banger.errors import BangerError
from banger.oci.reference import is_loopback
from banger.oci.transfer import SILENCE_S, Stalled, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from banger.oci.work import Work

_CONNECT_S = 20.0
_RETRIED = frozenset((408, 429, 500, 502, 503, 504))
_ATTEMPTS = 5
_LONGEST_WAIT_S = 120.0
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MOST_REDIRECTS = 5
_READ = 256 << 10
_CERTS = Path("/etc/docker/certs.d")

_Failures = (urllib3.exceptions.HTTPError, OSError)


class BrokenTransfer(Exception):
    """The body did not come whole; the message says why. Asking again may help."""


class Response:
    """An answer whose body has not been read; owned by the `with` block that it is made in."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, url: str, silence_s: float) -> None:
        self._raw = raw
        self._silence_s = silence_s
        self.status = raw.status
        self.headers: Mapping[str, str] = raw.headers
        self.url = url

    def read(self) -> bytes:
        """What is there of the body, b"" at its end.

        Raises:
            BrokenTransfer: the connection broke or fell silent.
        """
        try:
            return self._raw.read1(_READ, decode_content=False)
        except _Failures as e:
            raise BrokenTransfer(explain(e)) from e

    def text(self, most: int) -> bytes:
        """The whole body.

        Raises:
            BrokenTransfer: as `read`; it has more than `most` bytes; it comes as a trickle.
        """
        parts, size = [], 0
        watch = Watch(window_s=self._silence_s)
        while piece := self.read():
            parts.append(piece)
            size += len(piece)
            if size > most:
                raise BrokenTransfer(f"it sends more than {most} bytes")
            try:
                watch.saw(len(piece))
            except Stalled as e:
                raise BrokenTransfer(str(e)) from e
        return b"".join(parts)


class Http:
    """Requests for one pull. `loopback`: plain HTTP is allowed, to this host only."""

    def __init__(
        self,
        work: Work,
        *,
        ca_for: str | None = None,
        silence_s: float = SILENCE_S,
        first_pause_s: float = 1.0,
    ) -> None:
        """`ca_for`: a registry (host:port) whose own CA Docker may have been told of."""
        self._work = work
        self._silence_s = silence_s
        self._first_pause_s = first_pause_s
        self._guard = threading.Lock()
        # Not the connections: one whose server announces its end forgets its socket before the body
        # has been read.
        self._sockets: set[socket.socket] = set()
        self._managers: dict[tuple[str | None, bool], urllib3.PoolManager] = {}
        self._ca_for = ca_for
        self._proxies = getproxies_environment()

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        """Whom to trust. Reading this host's certificates takes 50 ms: only where TLS is spoken."""
        context = ssl.create_default_context()
        if self._ca_for is not None and "/" not in self._ca_for:
            for ca in sorted((_CERTS / self._ca_for).glob("*.crt")):
                context.load_verify_locations(ca)
        return context

    def close(self) -> None:
        for manager in self._managers.values():
            manager.clear()

    def interrupt(self) -> None:
        """End every transfer at once; what waits for one gets BrokenTransfer. Any thread."""
        with self._guard:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        authorization: str | None = None,
        body: bytes | None = None,
        follow: bool = True,
    ) -> Iterator[Response]:
        """One answer, after retries and redirects. `authorization` goes to the URL's own host only.

        Statuses other than those that ask for a retry are the caller's to judge.

        Raises:
            BangerError: operation_failed: no answer; not_found: the host is not known.
        """
        first = _origin(url)
        here = url
        for _ in range(_MOST_REDIRECTS + 1):
            sent = dict(headers or {})
            if authorization is not None and _origin(here) == first:
                sent["Authorization"] = authorization
            raw = self._answer(method, here, sent, body)
            try:
                location = raw.headers.get("Location")
                if not follow or raw.status not in _REDIRECTS or not location:
                    yield Response(raw, here, self._silence_s)
                    return
                try:
                    there = address_from(here, location)
                except ValueError as e:
                    raise BangerError(
                        "operation_failed",
                        f"asking {place(here)}: it redirects to what is no address",
                    ) from e
                _check_redirect(here, there)
                here = there
            finally:
                # Unread bytes make a connection useless for the next request.
                raw.close()
                raw.release_conn()
        raise BangerError("operation_failed", f"asking {place(url)}: too many redirects")

    def _answer(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        """An answer that is not one of those that mean "later"."""
        attempt = 0
        while True:
            attempt += 1
            self._work.check()
            wait_s = self.pause_s(attempt)
            try:
                raw = self._send(method, url, headers, body)
            except _Failures as e:
                self._work.check()  # a cancellation breaks connections
                if attempt >= _ATTEMPTS or not _may_pass(e):
                    raise self._failed(url, e) from e
                why = explain(e)
            else:
                if raw.status not in _RETRIED:
                    return raw
                why = f"status {raw.status}"
                asked = retry_after_s(raw.headers.get("Retry-After"))
                raw.close()
                if attempt >= _ATTEMPTS or (asked or 0) > _LONGEST_WAIT_S:
                    later = f" and asks to come back in {asked:.0f} s" if asked else ""
                    kind = "rate_limited" if raw.status == 429 else None
                    raise BangerError(
                        "operation_failed",
                        f"asking {place(url)}: it answers with {why}{later}",
                        reason=kind,
                    )
                wait_s = wait_s if asked is None else asked
            self.wait(wait_s, f"{host_of(url)}: {why}")

    def pause_s(self, attempt: int) -> float:
        """How long to wait after the attempt of this number: doubled each time."""
        return float(self._first_pause_s * 2 ** (attempt - 1))

    def wait(self, seconds: float, why: str) -> None:
        """Wait before trying again, and say so."""
        self._work.advance(0, None, f"waiting {seconds:.0f} s ({why})")
        self._work.wait(seconds)

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        parts = urllib.parse.urlsplit(url)
        return self._manager(parts).urlopen(
            method,
            url,
            body=body,
            headers={
                "User-Agent": f"banger/{__version__}",
                "Accept-Encoding": "identity",
                **headers,
            },
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=self._silence_s),
        )

    def _manager(self, parts: urllib.parse.SplitResult) -> urllib3.PoolManager:
        """The pools for a URL: direct, or through the proxy that the environment names."""
        proxy = find_proxy(parts.scheme, parts.hostname or "", parts.netloc, self._proxies)
        key = (proxy, parts.scheme == "https" or (proxy or "").startswith("https"))
        with self._guard:
            if key not in self._managers:
                self._managers[key] = self._make_manager(*key)
            return self._managers[key]

    def _make_manager(self, proxy: str | None, secure: bool) -> urllib3.PoolManager:
        options: dict[str, Any] = {"maxsize": 4}
        if secure:
            options["ssl_context"] = self._context
        manager: urllib3.PoolManager
        if proxy is None:
            manager = urllib3.PoolManager(**options)
        else:
            parts = urllib.parse.urlsplit(proxy)
            if parts.username:
                words = (
                    f"{urllib.parse.unquote(parts.username)}:"
                    f"{urllib.parse.unquote(parts.password or '')}"
                )
                options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=words)
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
            manager = urllib3.ProxyManager(bare.geturl(), **options)
        manager.pool_classes_by_scheme = _tracking_pools(self._track)
        return manager

    def _track(self, connection: HTTPConnection) -> None:
        with self._guard:
            self._sockets = {s for s in self._sockets if s.fileno() >= 0}
            if connection.sock is not None:
                self._sockets.add(connection.sock)

    def _failed(self, url: str, e: BaseException) -> BangerError:
        parts = urllib.parse.urlsplit(url)
        proxy = find_proxy(parts.scheme, parts.hostname or "", parts.netloc, self._proxies)
        through = f" through the proxy {host_of(proxy)}" if proxy else ""
        return BangerError("operation_failed", f"asking {place(url)}{through}: {explain(e)}")


def _tracking_pools(track: Callable[[HTTPConnection], None]) -> dict[str, type[HTTPConnectionPool]]:
    """Pools whose connections are known as soon as they are open, so that they can be ended."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            track(self)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            track(self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def find_proxy(scheme: str, host: str, netloc: str, proxies: Mapping[str, str]) -> str | None:
    """The proxy for a URL, by `http_proxy`, `https_proxy` and `no_proxy`; this host needs none."""
    # The stubs do not know this function.
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if is_loopback(host) or bypass(netloc, dict(proxies)):
        return None
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy:
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def host_of(url: str) -> str:
    """Host and port of a URL, without a login that it may hold."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def place(url: str) -> str:
    """A URL as messages show it: queries may hold signatures."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{host_of(url)}{parts.path}"


def address_from(here: str, named: str) -> str:
    """The URL that an answer of `here` names. Raises ValueError: it is none."""
    there = urllib.parse.urljoin(here, named)
    _origin(there)  # looks at the port, which urlsplit only keeps
    return there


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, as a number or a date; None where it is neither."""
    if not value:
        return None
    if value.isascii() and value.strip().isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):  # a year that no time has, too
        return None
    return max(0.0, when - time.time())


def explain(e: BaseException) -> str:
    """Why a request failed, in words that hold no address and no login."""
    if isinstance(e, urllib3.exceptions.ProxyError) and e.original_error is not None:
        return f"the proxy: {explain(e.original_error)}"
    if isinstance(e, urllib3.exceptions.SSLError):
        cause = e.args[0] if e.args else e
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {cause.verify_message}"
        return "TLS failed"
    if isinstance(e, urllib3.exceptions.NameResolutionError):
        return "the name of the host is not known"
    if isinstance(e, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(e, urllib3.exceptions.NewConnectionError):
        behind = e.__cause__
        return (behind.strerror if isinstance(behind, OSError) else None) or "no connection"
    if isinstance(e, urllib3.exceptions.HTTPError):
        return "the connection broke"
    return getattr(e, "strerror", None) or type(e).__name__


def _may_pass(e: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    return not isinstance(
        e,
        (
            urllib3.exceptions.SSLError,
            urllib3.exceptions.NameResolutionError,
            urllib3.exceptions.LocationValueError,
        ),
    )


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port


def _check_redirect(here: str, there: str) -> None:
    """Raises BangerError for a redirect that would lead out of what was encrypted."""
    old, new = urllib.parse.urlsplit(here), urllib.parse.urlsplit(there)
    if new.scheme == "https":
        return
    if new.scheme == "http" and old.scheme == "http" and is_loopback(new.hostname or ""):
        return
    raise BangerError(
        "operation_failed", f"asking {place(here)}: it redirects to {place(there)}, unencrypted"
    )
