"""`banger vm cp` into a guest: what is there already stays, large files go on where they stopped,
the rest is one tar. In the guest everything belongs to root."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from banger.cli.copying import LARGE_BYTES
from banger.cli.errors import warn
from banger.errors import BangerError
from banger.rpc.copies import PutFile, fetch_digests, part_name, place_tree, put_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.cli.copying import Copying

_CHUNK = 1 << 20


class _Entry(NamedTuple):
    """Something to copy: where it is, its name below the target, and what it was when listed."""

    path: Path
    name: bytes
    st: os.stat_result
    link: bytes | None
    """The name of an earlier entry that is the same file."""

    @property
    def regular(self) -> bool:
        return stat.S_ISREG(self.st.st_mode) and self.link is None


def upload(copying: Copying, source: str, target: str) -> None:
    """Copy `source`, `-` for stdin, to the path `target` of the guest."""
    if source == "-":
        with tempfile.NamedTemporaryFile() as spool:
            while chunk := sys.stdin.buffer.read(_CHUNK):
                spool.write(chunk)
            spool.flush()
            os.fchmod(spool.fileno(), 0o644)
            _upload_file(copying, Path(spool.name), None, target)
        return
    path = Path(source)
    try:
        if path.is_dir() and not path.is_symlink():
            # pathlib has dropped what says "the content": DIR/. and . itself.
            inside = os.path.basename(source) in (".", "..")  # noqa: PTH119
            _upload_directory(copying, path, target, inside=inside)
        else:
            path.lstat()  # before the guest is asked
            _upload_file(copying, path, os.fsencode(path.name), target)
    except OSError as e:
        raise BangerError("operation_failed", f"reading {e.filename}: {e.strerror}") from e


def _upload_file(copying: Copying, path: Path, name: bytes | None, target: str) -> None:
    directory, base = _find_target(copying, name, target)
    copying.stage("copying into the guest", f"{directory}/{os.fsdecode(base)}")
    entry = _Entry(path, base, path.lstat(), None)
    if not entry.regular and not stat.S_ISLNK(entry.st.st_mode):
        warn(f"left out, since it is no plain file: {path}")
        return
    copying.attended(lambda: _send(copying, directory, [entry], there=True))


def _upload_directory(copying: Copying, path: Path, target: str, *, inside: bool) -> None:
    facts = copying.guest.stat(target)
    if facts is None:
        place = _real(copying, target)
    elif facts.kind != "directory":
        raise BangerError("bad_request", f"{target} in the guest is no directory")
    else:
        place = facts.path if inside else f"{facts.path.rstrip('/')}/{path.name}"
    copying.stage("copying into the guest", place)
    entries = list(_walk(path, b".", {}))

    def send() -> None:
        if copying.guest.stat(place) is not None:
            _send(copying, place, entries, there=True)
            return
        # A new directory gets its name when all is in it, so that the same words mean the same
        # when they are said again after an interruption.
        above, _, name = place.rpartition("/")
        gathered = f"{above}/{os.fsdecode(part_name(os.fsencode(name)))}"
        _send(copying, gathered, entries, there=copying.guest.stat(gathered) is not None)
        place_tree(copying.guest, place)

    copying.attended(send)


def _walk(path: Path, name: bytes, known: dict[tuple[int, int], bytes]) -> Iterator[_Entry]:
    """A file or a directory with all that is in it; links stay links."""
    st = path.lstat()
    kind = stat.S_IFMT(st.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        warn(f"left out, since it is no plain file: {path}")
        return
    link = None
    if kind == stat.S_IFREG and st.st_nlink > 1:
        first = known.setdefault((st.st_dev, st.st_ino), name)
        link = first if first != name else None
    yield _Entry(path, name, st, link)
    if kind == stat.S_IFDIR:
        for child in sorted(path.iterdir()):
            yield from _walk(child, name + b"/" + os.fsencode(child.name), known)


def _send(copying: Copying, place: str, entries: list[_Entry], *, there: bool) -> None:
    """Send what differs. `there`: something may be in the guest that does not."""
    files = [e for e in entries if e.regular]
    copying.expect(sum(e.st.st_size for e in files))
    same = _find_same(copying, place, files) if there else set()
    for entry in files:
        if entry.name in same:
            copying.spare(entry.st.st_size, files=1)
    large = [e for e in files if e.name not in same and e.st.st_size >= LARGE_BYTES]
    for entry in large:
        _send_large(copying, place, entry)
    done = same.union(e.name for e in large)
    rest = [e for e in entries if e.name not in done]
    if rest:
        copying.guest.put(place, lambda out: _write_tar(copying, out, rest), mode="merge")


def _find_same(copying: Copying, place: str, files: list[_Entry]) -> set[bytes]:
    """The names of files that the guest has as they are here."""
    try:
        digests = fetch_digests(copying.guest, place, [(e.name, e.st.st_size) for e in files])
    except BangerError as e:
        if not copying.guest.is_absent(e):
            raise
        return set()
    same = set()
    for entry, there in zip(files, digests, strict=True):
        alike = there.mode == entry.st.st_mode and (there.uid, there.gid) == (0, 0)
        if alike and _sha256(entry.path, entry.st.st_size) == there.sha256:
            same.add(entry.name)
    return same


def _sha256(path: Path, size: int) -> bytes:
    """Of the first bytes of a file; of what there is when it is shorter."""
    hashed = hashlib.sha256()
    with path.open("rb") as f:
        while size and (chunk := f.read(min(size, _CHUNK))):
            hashed.update(chunk)
            size -= len(chunk)
    return hashed.digest()


def _send_large(copying: Copying, place: str, entry: _Entry) -> None:
    path, size = entry.path, entry.st.st_size

    def agree(have: int, sha256: bytes) -> bool:
        if _sha256(path, have) != sha256:
            return False
        copying.spare(have)
        return True

    def write(out: BinaryIO, at: int) -> None:
        with path.open("rb") as f:
            f.seek(at)
            while at < size:
                chunk = f.read(min(size - at, _CHUNK))
                if not chunk:
                    raise BangerError("operation_failed", f"{path} was cut while it was read")
                out.write(chunk)
                copying.advance(len(chunk))
                at += len(chunk)

    mode, mtime = stat.S_IMODE(entry.st.st_mode), int(entry.st.st_mtime)
    put_file(copying.guest, PutFile(place, entry.name, size, mode, mtime), agree, write)
    copying.landed()


def _write_tar(copying: Copying, out: BinaryIO, entries: list[_Entry]) -> None:
    # GNU format: names are bytes there; a pax record has to be UTF-8.
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8",
        errors="surrogateescape",
    ) as tar:  # fmt: skip
        for entry in entries:
            member = tarfile.TarInfo(os.fsdecode(entry.name))
            member.mode = stat.S_IMODE(entry.st.st_mode)
            member.mtime = int(entry.st.st_mtime)
            if entry.link is not None:
                member.type, member.linkname = tarfile.LNKTYPE, os.fsdecode(entry.link)
            elif stat.S_ISDIR(entry.st.st_mode):
                member.type = tarfile.DIRTYPE
            elif stat.S_ISLNK(entry.st.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.fsdecode(entry.path.readlink())
            else:
                with entry.path.open("rb") as f:
                    member.size = os.fstat(f.fileno()).st_size
                    tar.addfile(member, _Counting(f, copying))
                copying.landed()
                continue
            tar.addfile(member)


class _Counting:
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, copying: Copying) -> None:
        self._file = file
        self._copying = copying

    def read(self, size: int = -1) -> Any:
        data = self._file.read(size)
        self._copying.advance(len(data))
        return data


def _find_target(copying: Copying, name: bytes | None, target: str) -> tuple[str, bytes]:
    """Directory and base name in the guest for one file."""
    facts = copying.guest.stat(target)
    if facts is not None and facts.kind == "directory":
        if name is None:
            raise BangerError("bad_request", f"{target} in the guest is a directory; name a file")
        return facts.path, name
    base = target.rstrip("/").rpartition("/")[2]
    if target.endswith("/") or base in ("", ".", ".."):
        raise BangerError("not_found", f"there is no directory {target} in the guest")
    return _real(copying, target).rpartition("/")[0] or "/", os.fsencode(base)


def _real(copying: Copying, path: str) -> str:
    """The path with the links of its existing part followed: the agent follows none."""
    parts = [x for x in path.split("/") if x not in ("", ".")]
    for count in range(len(parts) - 1, 0, -1):
        facts = copying.guest.stat("/" + "/".join(parts[:count]))
        if facts is not None:
            return "/".join([facts.path.rstrip("/"), *parts[count:]])
    return "/" + "/".join(parts)
