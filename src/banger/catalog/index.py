"""The index of published bundles: `index.json`, beside it `index.json.minisig`.

A document with a version that grows and a date on which it ends, so that neither an older one nor
one that nobody renews can be passed off as the present one. Whoever publishes rewrites both files;
whoever reads believes nothing before the signature was checked.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Literal

import msgspec

from banger import files, minisign
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.names import check_entry_name
from banger.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCHEMA = 1
MOST_INDEX_BYTES = 4 << 20
MOST_SIGNATURE_BYTES = 4 << 10
MOST_BUNDLE_BYTES = 8 * GIB
SIGNATURE_SUFFIX = ".minisig"
VALID_DAYS = 90
"""How long an index is good for when nobody says otherwise."""

Kind = Literal["image", "kernel"]


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle (spec 5.4). `file` lies beside the index and is named after the content."""

    kind: Kind
    name: str
    distro: str
    arch: str
    kernel_ref: str | None = None
    kernel_version: str | None = None
    file: str
    sha256: str
    size_bytes: int
    description: str = ""

    def __post_init__(self) -> None:
        check_entry_name(self.name, self.kind)
        if not re.fullmatch(r"[a-z0-9_]{1,16}", self.arch):
            raise ValueError(f"{self.name}: {self.arch!r} is no architecture")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.name}: sha256 must be 64 hex digits")
        if self.file != bundle_name(self.name, self.arch, self.sha256):
            raise ValueError(f"{self.name}: {self.file!r} is not the name of its content")
        if not 0 < self.size_bytes <= MOST_BUNDLE_BYTES:
            raise ValueError(f"{self.name}: size_bytes must be 1 to {MOST_BUNDLE_BYTES}")
        if self.kind == "image" and not self.kernel_ref:
            raise ValueError(f"{self.name}: an image names the kernel that it boots with")


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """`index.json`. `expires` is RFC 3339 in UTC."""

    schema: int = SCHEMA
    version: int
    expires: str
    entries: tuple[IndexEntry, ...] = ()

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError("version must be 1 or more")
        expiry_of(self.expires)
        keys = [(e.kind, e.name, e.arch) for e in self.entries]
        if len(set(keys)) != len(keys):
            raise ValueError("it has an entry twice")

    def find(self, kind: Kind, name: str, arch: str = "amd64") -> IndexEntry | None:
        """The entry, or None: only then is something "not in the index"."""
        return next(
            (e for e in self.entries if (e.kind, e.name, e.arch) == (kind, name, arch)), None
        )


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    schema: int


def bundle_name(name: str, arch: str, sha256: str) -> str:
    """The file name of a bundle: another content is another name."""
    return f"{name}-{arch}-{sha256[:16]}.tar.zst"


def expiry_of(text: str) -> datetime.datetime:
    """Raises ValueError for what is no time with a zone."""
    when = datetime.datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError(f"expires {text!r} has no time zone")
    return when


def parse_index(data: bytes, *, what: str) -> Index:
    """An index whose signature was checked before; `what` names it in messages.

    Raises:
        BangerError: operation_failed, reason bad_index: unknown schema, or no valid index.
    """
    try:
        schema = decode_json(data, type=_Head).schema
        if schema != SCHEMA:
            raise ValueError(f"it has the schema {schema}, and this banger knows {SCHEMA} only")
        return decode_json(data, type=Index)
    except (BangerError, *MALFORMED) as e:
        raise bad_index(f"reading {what}: {e}") from e


def format_index(index: Index) -> bytes:
    """As it is published: sorted by name, readable."""
    ordered = sorted(index.entries, key=lambda e: (e.name, e.kind, e.arch))
    whole = msgspec.structs.replace(index, entries=tuple(ordered))
    return msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n"


def verify_index(
    data: bytes,
    signature: bytes,
    keys: Sequence[minisign.PublicKey],
    *,
    what: str,
    now: datetime.datetime | None = None,
) -> Index:
    """The index in `data`, when one of the keys signed it and it has not ended.

    Raises:
        BangerError: operation_failed, reason bad_index.
    """
    try:
        minisign.verify(data, signature, keys)
    except minisign.BadSignature as e:
        raise bad_index(f"checking the signature of {what}: {e}") from e
    index = parse_index(data, what=what)
    if (now or datetime.datetime.now(datetime.UTC)) >= expiry_of(index.expires):
        raise bad_index(
            f"reading {what}: it ended on {index.expires}; whoever publishes it has to renew it"
        )
    return index


def bad_index(message: str) -> BangerError:
    return BangerError("operation_failed", message, reason="bad_index")


def with_entry(index: Index | None, entry: IndexEntry | None, *, days: int = VALID_DAYS) -> Index:
    """The next version of an index, good for `days` from now; `entry` replaces its predecessor."""
    old = index.entries if index else ()
    if entry is not None:
        same = (entry.kind, entry.name, entry.arch)
        old = (*(e for e in old if (e.kind, e.name, e.arch) != same), entry)
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return Index(
        version=(index.version if index else 0) + 1,
        expires=end.isoformat(timespec="seconds").replace("+00:00", "Z"),
        entries=old,
    )


def signature_path(path: Path) -> Path:
    return path.with_name(path.name + SIGNATURE_SUFFIX)


def read_published(path: Path, keys: Sequence[minisign.PublicKey]) -> Index:
    """The index at `path`, its signature checked; one that has ended is fine for its publisher.

    Raises:
        BangerError: operation_failed, also with reason bad_index.
    """
    try:
        data = path.read_bytes()
        signature = signature_path(path).read_bytes()
    except OSError as e:
        raise BangerError(
            "operation_failed", f"reading the index {e.filename}: {e.strerror}"
        ) from e
    then = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return verify_index(data, signature, keys, what=f"the index {path}", now=then)


def publish_index(path: Path, index: Index, key: minisign.SecretKey) -> None:
    """Write index and signature, readable for a web server. The bundles must be there before.

    Raises:
        BangerError: operation_failed: it cannot be written.
    """
    data = format_index(index)
    comment = f"file:{path.name}\tversion:{index.version}\texpires:{index.expires}"
    try:
        files.write_atomic(path, data, mode=0o644)
        signed = minisign.sign(data, key, trusted_comment=comment)
        files.write_atomic(signature_path(path), signed.encode(), mode=0o644)
    except OSError as e:
        raise BangerError("operation_failed", f"writing the index {path}: {e.strerror}") from e
