"""An image in a registry: its digest by one request, its documents and layers through the cache.

Layers are fetched a few at a time. A transfer that breaks goes on where it broke; what arrives is
hashed on the way, and nothing is kept whose digest differs. A source lives for one pull.

Source: OCI distribution-spec 1.1, "Pull".
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from typing import IO, TYPE_CHECKING

from banger.errors import BangerError
from banger.oci.auth import Login
from banger.oci.blobs import BlobStore
from banger.oci.credentials import config_path, find_credentials
from banger.oci.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MOST_DOCUMENT_BYTES,
    Descriptor,
    Manifest,
    check_digest,
    choose_manifest,
    count_layers,
    digest_of,
    parse_config,
    parse_manifest_or_index,
    short,
)
from banger.oci.download import BadDownload, download
from banger.oci.errors import BadImage, reading
from banger.oci.http import BrokenTransfer, Http, Response, place
from banger.oci.layout import OciImage
from banger.oci.merge import Layer
from banger.oci.transfer import Meter
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from banger.oci.reference import RegistryReference
    from banger.oci.work import Work

_AT_ONCE = 3
_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_MOST_INDEXES = 3


class RegistrySource:
    """A registry's image, inside a `with` block.

    `require_space` is called with the bytes that are to be downloaded, and may refuse.
    """

    def __init__(
        self,
        reference: RegistryReference,
        *,
        blobs: Path,
        work: Work,
        require_space: Callable[[int], None] = lambda _: None,
        http: Http | None = None,
        docker_config: Path | None = None,
    ) -> None:
        self._reference = reference
        self._work = work
        self._require_space = require_space
        self._http = http or Http(work, ca_for=reference.host)
        self._blobs = BlobStore(blobs, work)
        scheme = "http" if reference.is_loopback else "https"
        self._base = f"{scheme}://{reference.host}/v2/{reference.repository}"
        self._login = Login(
            self._http,
            reference.repository,
            lambda: find_credentials(
                reference.registry, path=docker_config or config_path(), warn=work.warn
            ),
        )
        self._login_guard = threading.Lock()
        self._digest: str | None = reference.digest
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RegistrySource:
        with self._stack:
            self._stack.callback(self._http.close)
            self._stack.enter_context(self._blobs)
            self._stack.enter_context(self._work.interrupting(self._http.interrupt))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def digest(self) -> str:
        """What the reference means now: itself, where it is a digest, else one request.

        Raises:
            BangerError: not_found, unauthorized, operation_failed.
        """
        if self._digest is None:
            url = f"{self._base}/manifests/{self._reference.version}"
            with self._ask("HEAD", url, {"Accept": _ACCEPT}) as answer:
                told = answer.headers.get("Docker-Content-Digest", "")
                if answer.status == 200 and told:
                    with reading(f"{self._reference}"):
                        self._digest = check_digest(told)
            if self._digest is None:  # an optional header, and some registries know no HEAD
                self._digest = digest_of(self._document(url))
        return self._digest

    def fetch(self) -> OciImage:
        """Documents and layers, out of the cache where they are there.

        Raises:
            BangerError: not_found, unauthorized; operation_failed, also with reason bad_image.
        """
        digest = self.digest
        with reading(f"{self._reference}"):
            manifest = self._manifest(digest)
            self._fetch_blobs((manifest.config,), quiet=True)
            config = parse_config(self._blobs.read(manifest.config.digest), len(manifest.layers))
            self._fetch_blobs(manifest.layers, quiet=False)
        layers = tuple(
            Layer(
                diff_id=diff_id,
                digest=descriptor.digest,
                size=descriptor.size,
                open=self._opener(descriptor.digest),
            )
            for descriptor, diff_id in zip(manifest.layers, config.rootfs.layers, strict=True)
        )
        return OciImage(digest=digest, config=config, layers=layers)

    def drop_damaged(self) -> bool:
        """Remove what lies damaged in the cache; whether there was any, so that a retry helps."""
        return self._blobs.drop_damaged() > 0

    def _opener(self, digest: str) -> Callable[[], IO[bytes]]:
        return lambda: self._blobs.open(digest)

    # Documents
    def _manifest(self, digest: str) -> Manifest:
        for _ in range(_MOST_INDEXES):
            url = f"{self._base}/manifests/{digest}"
            data = self._document(url)
            if digest_of(data) != digest:
                raise BadImage(f"the manifest that the registry sends is not {short(digest)}")
            found = parse_manifest_or_index(data)
            if isinstance(found, Manifest):
                if found.config.size > MOST_DOCUMENT_BYTES:
                    raise BadImage(f"a configuration of {format_size(found.config.size)}")
                return found
            digest = choose_manifest(found).digest
        raise BadImage("indexes are nested too deeply")

    def _document(self, url: str) -> bytes:
        with self._ask("GET", url, {"Accept": _ACCEPT}) as answer:
            self._judge(answer)
            try:
                return answer.text(MOST_DOCUMENT_BYTES)
            except BrokenTransfer as e:
                raise BangerError("operation_failed", f"asking {place(url)}: {e}") from e

    @contextlib.contextmanager
    def _ask(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Response]:
        """One answer; where the registry wants to know who asks, it is told and asked again."""
        for last in (False, True):
            header = self._login.header
            with self._http.request(method, url, headers=headers, authorization=header) as answer:
                demanded = answer.headers.get("WWW-Authenticate")
                if last or answer.status != 401 or not demanded or answer.url != url:
                    yield answer
                    return
            with self._login_guard:
                # Another thread may have got a newer one meanwhile.
                if self._login.header == header:
                    self._login.answer(url, demanded)

    def _judge(self, answer: Response) -> None:
        """Raises BangerError for an answer that is not the thing itself."""
        if answer.status in (200, 206):
            return
        name = f"{self._reference}"
        where = place(answer.url)
        if answer.status in (401, 403):
            login = "the login for it does not suffice" if self._login.has_login else "no login"
            raise BangerError(
                "unauthorized",
                f"pulling {name}: the registry refuses it ({login}); "
                "it is private, or there is no such repository",
                hint=f"docker login {self._reference.registry}",
            )
        if answer.status == 404:
            raise BangerError(
                "not_found",
                f"pulling {name}: the registry has no such image ({where})",
                hint="banger image pull --help",
            )
        raise BangerError(
            "operation_failed", f"pulling {name}: {where} answers with status {answer.status}"
        )

    # Blobs
    def _fetch_blobs(self, descriptors: tuple[Descriptor, ...], *, quiet: bool) -> None:
        wanted = list({d.digest: d for d in descriptors}.values())
        missing = [d for d in wanted if not self._blobs.find(d.digest, d.size)]
        if not missing:
            return
        size = sum(d.size for d in missing)
        self._require_space(size)
        cached = sum(d.size for d in wanted) - size
        if not quiet:
            here = f", {format_size(cached)} are cached" if cached else ""
            self._work.stage(
                "download", f"fetching {count_layers(len(missing))}, {format_size(size)}{here}"
            )
        meter = Meter(size, _tell_nobody if quiet else self._work.advance)
        failed = threading.Event()

        def fetch(descriptor: Descriptor) -> None:
            if failed.is_set():
                return
            try:
                self._blobs.ensure(
                    descriptor.digest,
                    descriptor.size,
                    lambda f: self._download(descriptor, f, meter, failed),
                )
            except BaseException:
                failed.set()
                self._http.interrupt()
                raise

        with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "blob") as threads:
            futures = [threads.submit(fetch, d) for d in missing]
            errors = [e for future in futures if (e := future.exception()) is not None]
        # The first that is a reason, not a consequence.
        if errors:
            raise next((e for e in errors if not isinstance(e, _Abandoned)), errors[0])

    def _download(
        self, descriptor: Descriptor, f: IO[bytes], meter: Meter, failed: threading.Event
    ) -> None:
        """Write one blob to `f`, checked; going on after breaks."""
        url = f"{self._base}/blobs/{descriptor.digest}"

        @contextlib.contextmanager
        def ask(headers: Mapping[str, str]) -> Iterator[Response]:
            with self._ask("GET", url, headers) as answer:
                if answer.status == 404 and descriptor.urls:
                    raise BadImage(
                        f"the registry does not have {short(descriptor.digest)}, a foreign layer, "
                        "which is to be had elsewhere; such images are not supported"
                    )
                self._judge(answer)
                yield answer

        def check() -> None:
            self._work.check()
            if failed.is_set():
                raise _Abandoned

        try:
            download(
                f,
                url,
                size=descriptor.size,
                sha256=descriptor.digest.removeprefix("sha256:"),
                ask=ask,
                http=self._http,
                meter=meter,
                check=check,
                hint=f"banger image pull {self._reference}",
            )
        except BadDownload as e:
            raise BadImage(f"for {short(descriptor.digest)} the registry {e}") from e


def _tell_nobody(done: int, total: int | None, detail: str) -> None:
    """A document of a few kilobytes is no progress worth drawing."""


class _Abandoned(Exception):
    """Another blob of the same image has failed."""
