"""`banger vm cp` out of a guest: what is here already stays, large files go on where they stopped,
the rest comes as one tar. Whatever the guest says, it lands below the directory that was named."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.cli.copying import LARGE_BYTES
from banger.cli.errors import warn
from banger.cli.opened import open_opened
from banger.errors import BangerError
from banger.rpc.copies import fetch_digests, read_file
from banger.units import format_size
from banger.workspace.landing import Landing
from banger.workspace.names import format_names
from banger.workspace.partial import Partial, gathered
from banger.workspace.tar_reader import TarReader, split_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.cli.copying import Copying
    from banger.rpc.copies import Head
    from banger.rpc.trees import Entry, PathFacts

_CHUNK = 1 << 20


def download(copying: Copying, source: str, target: str) -> None:
    """Copy the path `source` of the guest to `target`, `-` for stdout. A file takes the place of a
    file only: a pipe or /dev/null stays what it is, and gets the bytes."""
    facts = copying.guest.stat(source)
    if facts is None:
        raise BangerError("not_found", f"there is no {source} in VM {copying.vm}")
    if facts.kind == "other":
        raise BangerError("bad_request", f"{source} in the guest is no file or directory")
    copying.stage("copying out of the guest", source)
    if target == "-":
        _into(copying, source, facts, sys.stdout.buffer)
        return
    try:
        if (there := _find_stream(target)) is not None:
            with there:
                _into(copying, source, facts, there)
        elif facts.kind == "file":
            copying.attended(lambda: _download_file(copying, source, Path(target)))
        else:
            copying.attended(lambda: _download_directory(copying, source, Path(target)))
    except OSError as e:
        raise BangerError("operation_failed", f"writing {target}: {e.strerror}") from e


def _find_stream(target: str) -> BinaryIO | None:
    if (opened := open_opened(target)) is not None:
        return opened
    try:
        # Not through a link, which an earlier copy may have brought from the guest.
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        return None
    return os.fdopen(os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "wb")


def _into(copying: Copying, source: str, facts: PathFacts, out: BinaryIO) -> None:
    if facts.kind != "file":
        raise BangerError(
            "bad_request",
            f"{source} is a directory; a stream takes a file",
            hint=f"banger vm exec {copying.vm} -- tar -C {source} -c .",
        )

    def receive(head: Head, chunks: Iterator[bytes]) -> bool:
        copying.expect(head.size)
        for chunk in chunks:
            out.write(chunk)
            copying.advance(len(chunk))
        return True

    copying.attended(lambda: read_file(copying.guest, source, b"", 0, receive))
    out.flush()
    copying.landed()


def _download_file(copying: Copying, source: str, target: Path) -> None:
    if target.is_dir():
        directory, name = target, os.fsencode(source.rstrip("/").rpartition("/")[2])
    else:
        directory, name = target.absolute().parent, os.fsencode(target.name)
    with Landing(directory, f"copying {source}") as landing:
        _fetch(copying, source, b"", landing, [name])


def _fetch(copying: Copying, path: str, name: bytes, landing: Landing, parts: list[bytes]) -> None:
    """One file, from where an earlier copy has stopped."""
    with Partial(landing.directory(parts[:-1]), parts[-1]) as part:

        def receive(head: Head, chunks: Iterator[bytes]) -> bool:
            if not name:
                copying.expect(head.size)
            if part.size and (head.size < part.size or part.sha256() != head.sha256_before):
                return False
            if head.size - part.size > part.free_bytes():
                raise BangerError(
                    "operation_failed",
                    f"copying {path}: {format_size(head.size - part.size)} do not fit on this host",
                    reason="disk_full",
                )
            copying.spare(part.size)
            for chunk in chunks:
                part.write(chunk)
                copying.advance(len(chunk))
            part.place(head.mode)
            return True

        if not read_file(copying.guest, path, name, part.size, receive):
            part.restart()
            read_file(copying.guest, path, name, 0, receive)
    copying.landed()


class _Plan(NamedTuple):
    """What need not come in the tar: names of files that are here, and of those that come alone."""

    same: dict[bytes, int]
    large: list[bytes]


def _download_directory(copying: Copying, source: str, target: Path) -> None:
    if target.is_dir() and not source.endswith("/."):
        base = source.rstrip("/").rpartition("/")[2]
        target = target / base if base not in ("", ".", "..") else target
    doing = f"copying {source}"
    scan = copying.guest.scan(source, inside_git=True)
    if scan is None:
        raise BangerError("not_found", f"there is no {source} in VM {copying.vm}")
    with (
        gathered(target) as place,
        Landing(place, doing, durable=place == target) as landing,
    ):
        plan = _plan(copying, source, scan, landing, doing)
        for size in plan.same.values():
            copying.spare(size, files=1)
        for name in plan.large:
            _fetch(copying, source, name, landing, split_name(name, doing))
        there = [*plan.same, *plan.large]

        def receive(stream: BinaryIO) -> list[bytes]:
            return _land(copying, stream, landing, doing, there)

        left_out = copying.guest.get(source, there, receive, inverted=True)
    if left_out:
        warn(f"left out, since they are no plain files: {format_names(left_out)}")


def _plan(
    copying: Copying, source: str, scan: dict[bytes, Entry], landing: Landing, doing: str
) -> _Plan:
    files = {n: e for n, e in scan.items() if stat.S_ISREG(e.mode)}
    copying.expect(sum(e.size for e in files.values()))
    # Other names of one file: they come as links to the first.
    seen: set[int] = set()
    first = {}
    for name, entry in files.items():
        if not split_name(name, doing):
            raise BangerError("operation_failed", f"{doing}: a file without a name")
        if entry.record.ino not in seen:
            first[name] = entry
            seen.add(entry.record.ino)
    candidates = [(n, e.size) for n, e in first.items() if _is_alike(landing, n, e, doing)]
    same: dict[bytes, int] = {}
    if candidates:
        digests = fetch_digests(copying.guest, source, candidates)
        for (name, size), there in zip(candidates, digests, strict=True):
            if there.mode and _sha256(landing, split_name(name, doing)) == there.sha256:
                same[name] = size
    large = [n for n, e in first.items() if e.size >= LARGE_BYTES and n not in same]
    return _Plan(same, large)


def _is_alike(landing: Landing, name: bytes, entry: Entry, doing: str) -> bool:
    """Whether a file is here of that size and with those permission bits."""
    fd = landing.find_file(split_name(name, doing))
    if fd is None:
        return False
    try:
        st = os.fstat(fd)
    finally:
        os.close(fd)
    return (st.st_size, st.st_mode & 0o777) == (entry.size, entry.mode & 0o777)


def _sha256(landing: Landing, parts: list[bytes]) -> bytes | None:
    fd = landing.find_file(parts)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def _land(
    copying: Copying, stream: BinaryIO, landing: Landing, doing: str, there: list[bytes]
) -> list[bytes]:
    """Unpack a guest's tar; the names of what is neither file nor directory nor link come back.
    `there` are files that are here already."""
    reader = TarReader(stream, doing)
    modes: list[tuple[list[bytes], int]] = []
    landed = {b"/".join(split_name(name, doing)) for name in there}
    left_out: list[bytes] = []

    def counted(most: int) -> bytes:
        chunk = reader.read(most)
        copying.advance(len(chunk))
        return chunk

    read: Callable[[int], bytes] = counted
    for member in reader:
        parts = split_name(member.name, doing)
        if member.kind == "directory":
            landing.directory(parts)
            modes.append((parts, member.mode))
        elif member.kind == "file":
            landing.file(parts, member.size, read, mode=member.mode)
            landed.add(b"/".join(parts))
            copying.landed()
        elif member.kind == "symlink":
            landing.symlink(parts, member.link)
        elif member.kind == "hardlink":
            to = split_name(member.link, doing)
            if b"/".join(to) not in landed:
                raise BangerError("operation_failed", f"{doing}: a link to what did not come")
            landing.hardlink(parts, to)
        else:
            left_out.append(member.name)
    for parts, mode in reversed(modes):
        landing.set_directory_mode(parts, mode)
    return left_out
