"""A guest's changed files on their way to the user's repository: how they are written, how they are
read, and how they are put there without harming what the user did meanwhile.

The first half runs in the daemon, the second with the user's own rights. Between them is one
stream (`banger.api.workspaces.ChangedFiles`). Nothing is changed before the whole stream has come
and every file on the host is still what was shipped.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.errors import BangerError
from banger.faults import step
from banger.files import is_abandoned, remove_tree, staging_directory
from banger.workspace.export import Change
from banger.workspace.index import EXECUTABLE, REGULAR, SYMLINK
from banger.workspace.landing import Landing
from banger.workspace.names import check_name, format_name, format_names
from banger.workspace.tar import TarWriter
from banger.workspace.tar_reader import TarReader, split_name
from banger.workspace.tree_id import TreeHasher
from banger.workspace.view import Content, directories
from banger.workspace.worktree import WorkTree

if TYPE_CHECKING:
    from pathlib import Path

_STAGING = "banger-apply"
_CHUNK = 1 << 20
_MAX_CHANGES = 2_000_000
_MAX_LINE = 5000


def write_changes(place: Path, changes: list[Change], out: BinaryIO) -> None:
    """The list of changes, then a tar of the new files, which lie in `place`. Raises OSError."""
    for change in changes:
        out.write(b"%s %s\0%s\0" % (_side(change.before), _side(change.after), change.name))
    out.write(b"\0")
    tar = TarWriter(out)
    with WorkTree(place) as tree:
        for change in changes:
            if change.after is None:
                continue
            if change.after.mode == SYMLINK:
                target = tree.read_link(change.name)
                assert target is not None
                tar.symlink(change.name, target, mtime=0)
                continue
            fd = tree.open(change.name)
            assert fd is not None
            with os.fdopen(fd, "rb") as f:
                size = os.fstat(fd).st_size
                mode = 0o755 if change.after.mode == EXECUTABLE else 0o644
                tar.stream(change.name, size, f.read, mode=mode, mtime=0)
    tar.finish()


def _side(content: Content | None) -> bytes:
    return b"0 -" if content is None else b"%o %s" % (content.mode, content.oid.hex().encode())


def read_changes(stream: BinaryIO) -> list[Change]:
    """The list in front of the tar. Raises BangerError when it is malformed."""
    changes: list[Change] = []
    while status := _read_word(stream):
        name = _read_word(stream)
        words = status.split(b" ")
        try:
            before, after = _parse_side(words[0], words[1]), _parse_side(words[2], words[3])
        except (IndexError, ValueError) as e:
            raise _malformed() from e
        if not name or len(changes) >= _MAX_CHANGES:
            raise _malformed()
        changes.append(Change(check_name(name), before, after))
    return changes


def _read_word(stream: BinaryIO) -> bytes:
    word = bytearray()
    while (byte := stream.read(1)) != b"\0":
        if not byte or len(word) > _MAX_LINE:
            raise _malformed()
        word += byte
    return bytes(word)


def _parse_side(mode: bytes, oid: bytes) -> Content | None:
    if mode == b"0":
        return None
    number = int(mode, 8)
    if number not in (REGULAR, EXECUTABLE, SYMLINK):
        raise ValueError(mode)
    return Content(number, bytes.fromhex(oid.decode()))


def _malformed() -> BangerError:
    return BangerError("operation_failed", "reading the changes of the guest: malformed")


class HostFacts(NamedTuple):
    """The user's repository. `file_mode`: its filesystem keeps x bits."""

    root: Path
    object_format: str
    file_mode: bool


class Applied(NamedTuple):
    """What `apply_changes` did, or would do: letter and name; `done` are those that the host has
    already, `conflicts` those that differ from what was shipped."""

    written: tuple[tuple[str, bytes], ...]
    done: tuple[bytes, ...]
    conflicts: tuple[bytes, ...]


def compare(host: HostFacts, changes: list[Change]) -> Applied:
    """What applying would do to the files below the root. Reads only. Raises BangerError."""
    root = host.root
    going = {c.name for c in changes if c.after is None}
    written: list[tuple[str, bytes]] = []
    done: list[bytes] = []
    conflicts: list[bytes] = []
    with WorkTree(root) as tree:
        for change in changes:
            name = change.name
            now = _content(tree, name, host)
            if isinstance(now, str):
                # A directory gives way when all that is in it goes.
                gives_way = now == "directory" and all(
                    name + b"/" + inside in going for inside in _list_below(root, name)
                )
                now = None if gives_way else now
            obstacle = change.after is not None and any(
                d not in going and (st := tree.find(d)) is not None and not stat.S_ISDIR(st.st_mode)
                for d in directories(name)
            )
            if isinstance(now, str) or obstacle:
                conflicts.append(name)
            elif _same(now, change.after, file_mode=host.file_mode):
                done.append(name)
            elif _same(now, change.before, file_mode=host.file_mode):
                letter = "D" if change.after is None else "A" if change.before is None else "M"
                written.append((letter, name))
            else:
                conflicts.append(name)
    return Applied(tuple(written), tuple(done), tuple(conflicts))


def _list_below(root: Path, name: bytes) -> list[bytes]:
    """Everything but directories below a directory, relative to it; no link is followed, and a
    repository inside counts as one file."""
    with WorkTree(root / os.fsdecode(name)) as tree:
        return [n for n, kind in tree.walk() if kind != stat.S_IFDIR or n.endswith(b".git")]


def apply_changes(host: HostFacts, changes: list[Change], stream: BinaryIO) -> Applied:
    """Put the changes into the files below the root; `stream` is at the tar.

    Raises:
        BangerError: reason conflict: the user changed one of the files meanwhile, and nothing was
            done; the stream is cut, and nothing was done; a file cannot be written.
    """
    root = host.root
    _refuse_conflicts(host, changes)
    _remove_abandoned(root)
    with staging_directory(root, _STAGING) as staging:
        with step("apply.receive"):
            _receive(staging, changes, stream)
        # Again: the stream may have taken its time.
        found = _refuse_conflicts(host, changes)
        wanted = dict.fromkeys(name for _, name in found.written)
        with step("apply.remove"):
            for change in changes:
                if change.after is None and change.name in wanted:
                    _remove(root, change.name)
            for change in changes:
                if change.after is not None and change.name in wanted:
                    _clear(root, change.name)
        doing = f"applying the changes to {root}"
        with step("apply.move"), Landing(root, doing) as landing, Landing(staging, doing) as source:
            for change in changes:
                if change.after is not None and change.name in wanted:
                    parts = change.name.split(b"/")
                    landing.move_in(source, parts)
    return found


def _remove_abandoned(root: Path) -> None:
    """What an `apply` that was killed had received and not put in its place: it is sent again."""
    for path in root.glob(f".{_STAGING}-*"):
        if path.is_dir() and not path.is_symlink() and is_abandoned(path):
            remove_tree(path)


def _refuse_conflicts(host: HostFacts, changes: list[Change]) -> Applied:
    found = compare(host, changes)
    if found.conflicts:
        raise BangerError(
            "operation_failed",
            f"applying the changes to {host.root}: changed here since the workspace was prepared: "
            f"{format_names(list(found.conflicts))}",
            hint="banger vm workspace export VM -o changes.patch && git apply --3way changes.patch",
            reason="conflict",
        )
    return found


def _receive(staging: Path, changes: list[Change], stream: BinaryIO) -> None:
    doing = "receiving the changes of the guest"
    missing = {c.name: c.after for c in changes if c.after is not None}
    reader = TarReader(stream, doing)
    with Landing(staging, doing) as landing:
        for member in reader:
            if member.kind == "directory":
                continue
            after = missing.pop(member.name, None)
            if after is None or (after.mode == SYMLINK) != (member.kind == "symlink"):
                raise BangerError("operation_failed", f"{doing}: a file that was not announced")
            parts = split_name(member.name, doing)
            if member.kind == "symlink":
                landing.symlink(parts, member.link)
            else:
                # As git makes files: what the user's umask leaves.
                mode = 0o777 if after.mode == EXECUTABLE else 0o666
                landing.file(parts, member.size, reader.read, mode=mode & ~_umask())
    if missing:
        raise BangerError("operation_failed", f"{doing}: {len(missing)} files did not come")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _content(tree: WorkTree, name: bytes, host: HostFacts) -> Content | str | None:
    """What the host has; a word when it is neither a file nor a link."""
    st = tree.find(name)
    if st is None:
        return None
    hasher = TreeHasher(host.object_format)
    if stat.S_ISLNK(st.st_mode):
        target = tree.read_link(name) or b""
        hashed = hasher.begin_blob(len(target))
        hashed.update(target)
        return Content(SYMLINK, hashed.digest())
    if not stat.S_ISREG(st.st_mode):
        return "directory" if stat.S_ISDIR(st.st_mode) else "special file"
    fd = tree.open(name)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as f:
        hashed = hasher.begin_blob(os.fstat(fd).st_size)
        while chunk := f.read(_CHUNK):
            hashed.update(chunk)
    executable = host.file_mode and st.st_mode & stat.S_IXUSR
    return Content(EXECUTABLE if executable else REGULAR, hashed.digest())


def _same(now: Content | None, other: Content | None, *, file_mode: bool) -> bool:
    if now is None or other is None:
        return now is other
    if now.oid != other.oid:
        return False
    return now.mode == other.mode or (not file_mode and SYMLINK not in (now.mode, other.mode))


def _remove(root: Path, name: bytes) -> None:
    """Remove a file, and the directories that it leaves empty, never through a link."""
    with Landing(root, f"applying the changes to {root}") as landing:
        parts = name.split(b"/")
        with suppress(FileNotFoundError):
            os.unlink(parts[-1], dir_fd=landing.directory(parts[:-1]))
        for depth in range(len(parts) - 1, 0, -1):
            try:
                os.rmdir(parts[depth - 1], dir_fd=landing.directory(parts[: depth - 1]))
            except OSError:
                return


def _clear(root: Path, name: bytes) -> None:
    """Remove the empty directories that a file takes the place of; rmdir(2) takes nothing else."""
    with WorkTree(root) as tree:
        st = tree.find(name)
    if st is None or not stat.S_ISDIR(st.st_mode):
        return
    with WorkTree(root / os.fsdecode(name)) as tree:
        inside = [name + b"/" + n for n, kind in tree.walk() if kind == stat.S_IFDIR]
    doing = f"applying the changes to {root}"
    with Landing(root, doing) as landing:
        for directory in (*reversed(inside), name):
            parts = directory.split(b"/")
            try:
                os.rmdir(parts[-1], dir_fd=landing.directory(parts[:-1]))
            except OSError as e:
                raise BangerError(
                    "operation_failed", f"{doing}: removing {format_name(directory)}: {e.strerror}"
                ) from e
