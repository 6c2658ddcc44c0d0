"""The published index as this installation sees it: fetched, checked, never an older one.

`<state>/index-seen.json` remembers the highest version of each index; it is all that is kept. The
index itself is asked for by each operation that wants it, a bundle lies in the staging directory of
who fetches it.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from banger import files
from banger.catalog.bundle import BadBundle, bad_bundle, unpack_bundle
from banger.catalog.download import fetch_file, read_document
from banger.catalog.index import (
    MOST_INDEX_BYTES,
    MOST_SIGNATURE_BYTES,
    SIGNATURE_SUFFIX,
    Index,
    IndexEntry,
    bad_index,
    verify_index,
)
from banger.decoding import MALFORMED, decode_json
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.minisign import PublicKey, parse_public_key
from banger.oci.http import Http, place
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from banger.config.paths import Paths
    from banger.config.settings import Settings
    from banger.disk.background import Job

T = TypeVar("T")

MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 1 << 20
# Who waits for a VM falls back to building it: an absent server is found out in some seconds.
_FIRST_PAUSE_S = 0.25


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """Where bundles come from, and whose signature counts (`index_url`, `index_keys`)."""

    url: str
    keys: tuple[PublicKey, ...]
    seen: Path
    reserve_bytes: int
    first_pause_s: float = _FIRST_PAUSE_S

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.url).netloc.rpartition("@")[2]


def find_published(paths: Paths, settings: Settings) -> Published | None:
    """The source that the configuration names; None when it names none."""
    if not settings.index_url:
        return None
    return Published(
        url=settings.index_url,
        keys=tuple(parse_public_key(key) for key in settings.index_keys),
        seen=paths.index_seen,
        reserve_bytes=settings.disk_reserve_bytes,
    )


def read_index(source: Published, job: Job) -> Index:
    """The present index.

    Raises:
        BangerError: operation_failed: it cannot be fetched; with reason bad_index: not signed by
            one of the keys, ended, of an unknown schema, or older than one that was seen before.
    """
    with _http(source, job) as http:
        data = read_document(http, source.url, most=MOST_INDEX_BYTES)
        signature = read_document(http, _signature_url(source.url), most=MOST_SIGNATURE_BYTES)
    what = f"the index {place(source.url)}"
    index = verify_index(data, signature, source.keys, what=what)
    with job.locked(source.seen.with_name(f".{source.seen.name}.lock")):
        seen = _read_seen(source.seen)
        last = seen.get(source.url, 0)
        if index.version < last:
            raise bad_index(
                f"reading {what}: it is version {index.version}, and version {last} was seen "
                "before: somebody passes off an old one"
            )
        if index.version > last:
            content = msgspec.json.encode({**seen, source.url: index.version}, order="sorted")
            files.write_atomic(source.seen, content)
    return index


def fetch_bundle(
    source: Published, entry: IndexEntry, target: Path, names: Collection[str], job: Job
) -> frozenset[str]:
    """Download a bundle into the empty directory `target` and unpack it there; the names found.

    Nothing is unpacked before all of it has the size and the hash that the index names. The
    downloaded file is removed.

    Raises:
        BangerError: as `fetch_file`; operation_failed, reasons bad_bundle and disk_full.
    """
    what = f"the bundle {entry.file}"

    def room_for(size: int) -> None:
        require_space(
            target,
            needed_bytes=size,
            reserve_bytes=source.reserve_bytes,
            doing=f"fetching {what}",
        )

    room_for(entry.size_bytes)
    job.stage("download", f"fetching {entry.name}, {format_size(entry.size_bytes)}")
    archive = target / ".bundle"
    try:
        with archive.open("w+b") as f:
            with _http(source, job) as http:
                url = urllib.parse.urljoin(source.url, entry.file)
                fetch_file(http, url, f, size=entry.size_bytes, sha256=entry.sha256, job=job)
            f.seek(0)
            job.stage("unpack", f"unpacking {entry.name}")
            try:
                return unpack_bundle(f, target, names, require_space=room_for, check=job.check)
            except BadBundle as e:
                raise bad_bundle(f"unpacking {what}", e) from e
    finally:
        archive.unlink(missing_ok=True)


def read_manifest(directory: Path, kind: type[T], *, what: str) -> T:
    """The manifest of an unpacked bundle. Raises BangerError, reason bad_bundle."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MOST_MANIFEST_BYTES:
            raise ValueError("its manifest is too large")
        return decode_json(path.read_bytes(), type=kind)
    except (OSError, *MALFORMED) as e:
        raise bad_bundle(f"reading {what}", e) from e


@contextlib.contextmanager
def _http(source: Published, job: Job) -> Iterator[Http]:
    http = Http(job, first_pause_s=source.first_pause_s)
    try:
        with job.interrupting(http.interrupt):
            yield http
    finally:
        http.close()


def _signature_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(path=parts.path + SIGNATURE_SUFFIX).geturl()


def _read_seen(path: Path) -> dict[str, int]:
    try:
        return decode_json(path.read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}
    except (OSError, *MALFORMED) as e:
        # Not an empty one: then an old index could come back.
        raise BangerError(
            "operation_failed",
            f"reading which index was seen last, {path}: {e}",
            hint=f"ls -l {path}",
        ) from e
