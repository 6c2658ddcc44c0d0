"""Opening files and directories that somebody else named: the only place where a path is looked up.

Every open goes component by component from `/` with O_NOFOLLOW, each step by the descriptor of the
one before, so that neither `..` nor a symbolic link at any place leads elsewhere. What comes back
is a descriptor; whoever uses the file uses that, and the path is never looked up twice.
Sources: openat(2), path_resolution(7), credentials(7), proc(5).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pwd
import stat
from typing import TYPE_CHECKING

from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterator

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_STICKY = stat.S_ISVTX


def split_path(path: str) -> tuple[str, ...]:
    """The components of an absolute path that the gate has let through.

    Raises:
        HelperError: bad_request: it has an empty, `.` or `..` component.
    """
    parts = tuple(path.split("/"))
    if not path.startswith("/") or any(part in ("", ".", "..") for part in parts[1:]):
        raise HelperError("bad_request", f"{path[:80]!r} is no absolute path without detours")
    return parts[1:]


def is_beneath(path: str, root: str) -> bool:
    """Whether a path lies below a directory, by their text."""
    top = split_path(root)
    parts = split_path(path)
    return len(parts) > len(top) and parts[: len(top)] == top


@contextlib.contextmanager
def as_owner(uid: int) -> Iterator[None]:
    """Look at files with the rights of a user, groups included, and with none of root's.

    The effective ids of the whole process change, so there must be one thread only.

    Raises:
        OSError
    """
    if uid == os.geteuid():
        yield
        return
    before = (os.getgroups(), os.getegid(), os.geteuid())
    gid, groups = find_groups(uid)
    try:
        os.setgroups(groups)
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        # Newest first. A failure would leave a helper that is neither root nor the owner.
        try:
            os.seteuid(before[2])
            os.setegid(before[1])
            os.setgroups(before[0])
        except OSError:
            os._exit(70)


@functools.cache
def find_groups(uid: int) -> tuple[int, list[int]]:
    """The primary group of a user, and all its groups; for a uid without a name the equal gid."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return uid, [uid]
    return entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)


def open_parent(path: str, *, trusted: bool = False, sticky_ok: bool = False) -> tuple[int, str]:
    """An O_PATH descriptor of the directory that holds the last component, and that component.

    With `trusted` every directory on the way has to be root's and writable by nobody else;
    `sticky_ok` also takes root's sticky ones (/tmp), where nobody may move what is root's.

    Raises:
        HelperError: a component is missing, a symbolic link, no directory, or not to be trusted.
    """
    parts = split_path(path)
    fd = os.open("/", _STEP | os.O_DIRECTORY)
    try:
        for depth, part in enumerate(parts):
            if trusted:
                check_trusted(
                    os.fstat(fd), "/" + "/".join(parts[:depth]), path, sticky_ok=sticky_ok
                )
            if depth == len(parts) - 1:
                return fd, part
            # O_DIRECTORY with O_NOFOLLOW: ENOTDIR for a symbolic link, wherever it leads.
            try:
                below = os.open(part, _STEP | os.O_DIRECTORY, dir_fd=fd)
            except OSError as e:
                raise _explain(e, fd, part, path) from e
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    raise AssertionError("split_path gives at least one component")


def open_directory(path: str, *, trusted: bool = False, sticky_ok: bool = False) -> int:
    """A directory itself, open for reading; `trusted` and errors as in `open_parent`."""
    parent, name = open_parent(path, trusted=trusted, sticky_ok=sticky_ok)
    try:
        try:
            fd = os.open(name, DIRECTORY, dir_fd=parent)
        except OSError as e:
            raise _explain(e, parent, name, path) from e
        try:
            if trusted:
                check_trusted(os.fstat(fd), path, path, sticky_ok=False)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(parent)


DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags that open a directory and nothing else."""


def check_trusted(found: os.stat_result, component: str, path: str, *, sticky_ok: bool) -> None:
    """Refuse a component that anyone but root can change.

    Raises:
        HelperError: unauthorized.
    """
    if found.st_uid == 0 and not found.st_mode & 0o022:
        return
    if sticky_ok and found.st_uid == 0 and found.st_mode & _STICKY:
        return
    raise HelperError(
        "unauthorized",
        f"{path[:200]!r} is not root's alone: {component[:200]!r} belongs to uid {found.st_uid} "
        f"with mode {stat.S_IMODE(found.st_mode):o}",
        hint=f"ls -ld {component or '/'}" if component.isascii() and " " not in component else None,
    )


def open_readable(path: str, *, owner_uid: int) -> int:
    """A regular file, anywhere, that the owner can read; opened for reading as the owner.

    Raises:
        HelperError: it is none, the owner may not read it, or a component is a symbolic link.
    """
    with as_owner(owner_uid):
        fd = _open_regular(path)
        try:
            # By the descriptor, so that nothing is looked up again; O_PATH checked no permission.
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as e:
            raise HelperError(
                "unauthorized", f"uid {owner_uid} may not read {path!r}: {e.strerror}"
            ) from e
        finally:
            os.close(fd)


def open_writable(path: str, *, roots: tuple[str, ...], owner_uid: int) -> int:
    """A regular file of the owner beneath one of the roots, with one name; open for both ways.

    Raises:
        HelperError: it is none, or lies elsewhere, or is somebody else's, or has a second name.
    """
    _check_beneath(path, roots)
    with as_owner(owner_uid):
        fd = _open_regular(path)
        try:
            return _open_own(fd, path, os.O_RDWR, owner_uid)
        finally:
            os.close(fd)


def open_log(path: str, *, roots: tuple[str, ...], owner_uid: int) -> int:
    """A file as `open_writable`, open for appending and reading; made (0600) where it is missing.

    Raises:
        HelperError: as `open_writable`.
    """
    _check_beneath(path, roots)
    with as_owner(owner_uid):
        parent, name = open_parent(path)
        try:
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o600, dir_fd=parent))
            fd = _open_entry(parent, name, path)
        except OSError as e:
            raise HelperError("operation_failed", f"making {path!r}: {e.strerror}") from e
        finally:
            os.close(parent)
        try:
            return _open_own(fd, path, os.O_RDWR | os.O_APPEND, owner_uid)
        finally:
            os.close(fd)


def _check_beneath(path: str, roots: tuple[str, ...]) -> None:
    if not any(is_beneath(path, root) for root in roots):
        raise HelperError(
            "unauthorized", f"{path[:200]!r} does not lie beneath {' or '.join(roots)}"
        )


def _open_own(fd: int, path: str, flags: int, owner_uid: int) -> int:
    found = os.fstat(fd)
    if found.st_uid != owner_uid:
        raise HelperError("unauthorized", f"{path[:200]!r} belongs to uid {found.st_uid}")
    if found.st_nlink != 1:
        raise HelperError(
            "unauthorized", f"{path[:200]!r} has {found.st_nlink} names (hard links), not one"
        )
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as e:
        raise HelperError(
            "unauthorized", f"uid {owner_uid} may not write {path[:200]!r}: {e.strerror}"
        ) from e


def _open_regular(path: str) -> int:
    parent, name = open_parent(path)
    try:
        return _open_entry(parent, name, path)
    finally:
        os.close(parent)


def _open_entry(parent: int, name: str, path: str) -> int:
    """An O_PATH descriptor of a regular file: a FIFO does not block, a device does nothing."""
    try:
        fd = os.open(name, _STEP, dir_fd=parent)
    except OSError as e:
        raise _explain(e, parent, name, path) from e
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise HelperError(
            "bad_request", f"{path[:200]!r} is {_KINDS[stat.S_IFMT(found.st_mode)]}, no file"
        )
    return fd


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def _explain(error: OSError, parent: int, name: str, path: str) -> HelperError:
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        with contextlib.suppress(OSError):
            kind = stat.S_IFMT(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            if kind in (stat.S_IFLNK, stat.S_IFREG):
                what = "a symbolic link" if kind == stat.S_IFLNK else "no directory"
                return HelperError(
                    "bad_request", f"{path[:200]!r} is refused: {name[:80]!r} in it is {what}"
                )
    code = "not_found" if error.errno == errno.ENOENT else "operation_failed"
    return HelperError(code, f"opening {path[:200]!r}: {name[:80]!r}: {error.strerror}")
