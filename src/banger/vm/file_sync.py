"""Files of the owner's home on their way into a guest: planned, then written as one tar.

A plan names what will go; the files themselves are opened when they are sent, so that a login token
that was renewed meanwhile arrives as it is then. Everything is reached by descriptors from the home
directory on, never through a symlink. Nothing outlives a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from banger.config.file_sync import GUEST_HOME
from banger.errors import BangerError
from banger.workspace.tar import build_header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.config.file_sync import FileSync
    from banger.guest.client import GuestClient

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: should it have become a FIFO since it was looked at, open must not wait for a writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What has gone, or become a link, since it was listed: it is not there to be sent.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_MOST_DEEP = 100
_CHUNK = 1 << 20
_BLOCK = 512
_KINDS = {
    stat.S_IFLNK: "a symlink",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A guest that takes less than this is stuck: bytes a second, and seconds for the rest.
_SLOWEST, _AT_LEAST_S = 256 << 10, 120.0


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One file or directory: components below the owner's (resolved) home and below /root.

    `mode` None: the file's own permission bits.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    directory: bool
    mode: int | None = None
    size: int = 0


class SyncPlan(msgspec.Struct, frozen=True, kw_only=True):
    home: str
    members: tuple[Member, ...]
    warnings: tuple[str, ...]

    @property
    def byte_count(self) -> int:
        return sum(member.size for member in self.members)


def choose_entries(entries: tuple[FileSync, ...], *, first_start: bool) -> tuple[FileSync, ...]:
    """The entries that this start of a VM sends."""
    return tuple(e for e in entries if e.when == "start" or first_start)


def plan_file_sync(entries: tuple[FileSync, ...], home: Path) -> SyncPlan:
    """What these entries send, as the host's files are now; nothing is changed or kept open.

    Raises:
        BangerError: something is unreadable, or a link leads out of the home directory.
    """
    real_home = os.path.realpath(home)
    members: list[Member] = []
    warnings: list[str] = []
    if entries:
        root = _open_home(real_home)
        try:
            for entry in entries:
                _plan_entry(entry, home, real_home, root, members, warnings)
        finally:
            os.close(root)
    return SyncPlan(home=real_home, members=tuple(members), warnings=tuple(warnings))


def _plan_entry(
    entry: FileSync,
    home: Path,
    real_home: str,
    root: int,
    members: list[Member],
    warnings: list[str],
) -> None:
    named = os.path.join(real_home, *entry.host_parts(home))  # noqa: PTH118  # realpath takes text
    source = _resolve(entry.host, named, real_home)
    if source is None:
        warnings.append(f"file_sync: {entry.host} does not exist and is skipped")
        return
    target = entry.guest_parts()
    try:
        parent = _open_below(root, source[:-1])
        try:
            found = os.stat(source[-1], dir_fd=parent, follow_symlinks=False)
            kind = stat.S_IFMT(found.st_mode)
            if kind == stat.S_IFREG:
                # Unreadable is told before a machine runs, not after.
                os.close(os.open(source[-1], _FILE, dir_fd=parent))
                members.append(
                    Member(source=source, target=target, directory=False,
                           mode=entry.mode_bits, size=found.st_size)
                )  # fmt: skip
            elif kind == stat.S_IFDIR:
                members.extend(_walk(parent, source, target, entry.host, warnings))
            else:
                what = _KINDS.get(kind, "no file")
                warnings.append(f"file_sync: {entry.host} is {what} and is skipped")
        finally:
            os.close(parent)
    except OSError as e:
        raise _error(entry.host, e) from e


def _resolve(shown: str, named: str, real_home: str) -> tuple[str, ...] | None:
    """Where the entry's own path leads, links followed; None when nothing is there."""
    try:
        real = os.path.realpath(named, strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise _error(shown, e) from e
    if not real.startswith(f"{real_home.rstrip('/')}/"):
        raise BangerError(
            "operation_failed",
            f"file_sync: {shown} leads to {real}, which is not inside {real_home}",
            hint=f"ls -ld {named}",
        )
    return tuple(real[len(real_home.rstrip("/")) + 1 :].split("/"))


def _walk(
    parent: int, source: tuple[str, ...], target: tuple[str, ...], shown: str, warnings: list[str]
) -> Iterator[Member]:
    """A directory and what is in it, each directory before its content, by name."""
    if len(target) > _MOST_DEEP:
        raise BangerError(
            "operation_failed", f"file_sync: {shown} is nested more than {_MOST_DEEP} deep"
        )
    fd = os.open(source[-1], _DIRECTORY, dir_fd=parent)
    try:
        yield Member(source=source, target=target, directory=True)
        for name in sorted(os.listdir(fd), key=os.fsencode):  # noqa: PTH208  # by descriptor
            path = f"{shown.rstrip('/')}/{name}"
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                kind = stat.S_IFMT(found.st_mode)
                if kind == stat.S_IFDIR:
                    yield from _walk(fd, (*source, name), (*target, name), path, warnings)
                elif kind == stat.S_IFREG:
                    os.close(os.open(name, _FILE, dir_fd=fd))
                    yield Member(
                        source=(*source, name), target=(*target, name), directory=False,
                        size=found.st_size,
                    )  # fmt: skip
                else:
                    what = _KINDS.get(kind, "no file")
                    warnings.append(f"file_sync: {_printable(path)} is {what} and is skipped")
            except OSError as e:
                if e.errno not in _GONE:
                    raise _error(path, e) from e
    finally:
        os.close(fd)


def write_sync_tar(plan: SyncPlan, out: BinaryIO) -> None:
    """Write the planned files, as they are now, as one tar of names below /root, all of 0:0.

    A file that has gone since is left out.

    Raises:
        BangerError: one cannot be read, or was cut while it was read; the stream is useless then.
    """
    root = _open_home(plan.home)
    try:
        for member in plan.members:
            _write_member(member, root, out)
    finally:
        os.close(root)
    out.write(bytes(2 * _BLOCK))


def _write_member(member: Member, root: int, out: BinaryIO) -> None:
    path = "/".join(member.source)
    name = os.fsencode("/".join(member.target))
    with contextlib.ExitStack() as opened:
        try:
            parent = _open_below(root, member.source[:-1])
            opened.callback(os.close, parent)
            flags = _DIRECTORY if member.directory else _FILE
            fd = os.open(member.source[-1], flags, dir_fd=parent)
            opened.callback(os.close, fd)
            found = os.fstat(fd)
        except OSError as e:
            if e.errno in _GONE:
                return
            raise _error(f"~/{path}", e) from e
        bits = stat.S_IMODE(found.st_mode) & 0o777
        if member.directory:
            out.write(
                build_header(name + b"/", mode=bits, size=0, mtime=int(found.st_mtime), kind=b"5")
            )
            return
        if not stat.S_ISREG(found.st_mode):
            return  # it has become something else, which is not sent
        mode = bits if member.mode is None else member.mode
        out.write(
            build_header(name, mode=mode, size=found.st_size, mtime=int(found.st_mtime), kind=b"0")
        )
        left = found.st_size
        while left:
            try:
                piece = os.read(fd, min(left, _CHUNK))
            except OSError as e:
                raise _error(f"~/{path}", e) from e
            if not piece:
                raise BangerError(
                    "operation_failed",
                    f"file_sync: ~/{_printable(path)} became shorter while it was read",
                )
            out.write(piece)
            left -= len(piece)
        out.write(bytes(-found.st_size % _BLOCK))


async def send_files(
    client: GuestClient, plan: SyncPlan, ended: asyncio.Future[Any], vm: str
) -> None:
    """Send the plan to a guest; its machine's end, `ended`, is the transfer's too.

    Raises:
        BangerError: of the guest's files each is the old or the new one.
    """
    limit_s = _AT_LEAST_S + plan.byte_count / _SLOWEST
    sending = asyncio.ensure_future(
        client.put(GUEST_HOME, lambda out: write_sync_tar(plan, out), mode="merge")
    )
    try:
        await asyncio.wait({sending, ended}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            why = "the machine ended" if ended.done() else f"not taken within {limit_s:.0f} s"
            raise _failed(vm, why)
        sending.result()
    except BangerError as e:
        # Without the cause's reason: it may be one that keeps a VM which is not ready.
        raise _failed(vm, e.message) from e
    finally:
        if not sending.done():
            sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def _failed(vm: str, why: str) -> BangerError:
    prefix = f"starting VM {vm}: copying the files of [[file_sync]]: "
    return BangerError("operation_failed", f"{prefix}{why.removeprefix(prefix)}")


def _open_home(real_home: str) -> int:
    try:
        return os.open(real_home, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise _error(real_home, e) from e


def _open_below(root: int, parts: tuple[str, ...]) -> int:
    """A new descriptor of a directory below `root`, reached through no link."""
    fd = os.dup(root)
    try:
        for part in parts:
            below = os.open(
                part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd
            )
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    return fd


def _error(path: str, e: OSError) -> BangerError:
    shown = _printable(path)
    return BangerError(
        "operation_failed", f"file_sync: reading {shown}: {e.strerror}", hint=f"ls -ld {shown}"
    )


def _printable(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path)
