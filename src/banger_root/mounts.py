"""Mounts of this process's own namespace: making a bind, and undoing what lies below a directory.

Python's standard library has no mount(2), so it is called through libc. A mount is always named by
a descriptor (`/proc/self/fd/N`), never by a path that somebody could have changed meanwhile.
Sources: mount(2), umount(2), mount_namespaces(7), proc(5).
"""

from __future__ import annotations

import ctypes
import os
import re

from banger_root.errors import HelperError

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = 0x20, 0x1000, 0x4000, 0x80000
_MNT_DETACH = 2
# More are in no jail of ours; an endless supply of them must not keep us here.
_LIMIT = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def enter_own_namespace() -> None:
    """Give this process a mount namespace of its own: what it mounts is seen by nobody else.

    Unmounts of the host still arrive in it, so that it pins no disk.

    Raises:
        OSError
    """
    _check(_libc.unshare(_CLONE_NEWNS))
    _mount(None, "/", _MS_REC | _MS_SLAVE)


def bind(source: int, directory: int, name: str, *, read_only: bool) -> None:
    """Mount an open file under a new name in a directory; without setuid, devices or execution.

    Both have to be opened in this mount namespace, and nobody else may write the directory.

    Raises:
        OSError
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(name, flags, 0o600, dir_fd=directory))
    place = f"/proc/self/fd/{directory}/{name}"
    _mount(f"/proc/self/fd/{source}", place, _MS_BIND)
    # A bind takes its options in a second step only.
    options = _MS_REMOUNT | _MS_BIND | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount(None, place, options | (_MS_RDONLY if read_only else 0))


def mount_of(fd: int) -> int:
    """The number of the mount that an open file is on."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as f:
        for line in f:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise HelperError("operation_failed", "the kernel tells no mnt_id in /proc/self/fdinfo")


def unmount_below(directory: str) -> None:
    """Detach every mount at or below a directory of this namespace, the newest first.

    Raises:
        HelperError: one cannot be reached without following a link.
        OSError
    """
    for _ in range(_LIMIT):
        found = _mounts_below(directory)
        if not found:
            return
        _detach(*found[-1])
    raise HelperError("operation_failed", f"{directory} has more than {_LIMIT} mounts in it")


def _mounts_below(directory: str) -> list[tuple[int, str]]:
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields = line.split(" ")
            place = _unescape(fields[4])
            # The kernel marks a place that is not reachable any more: nothing is in the way there.
            if place.endswith("//deleted"):
                continue
            if place == directory or place.startswith(f"{directory}/"):
                found.append((int(fields[0]), place))
    return found


def _detach(number: int, place: str) -> None:
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in place.split("/")[1:]:
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = below
        # A link on the way, or a name that moved: then this is another mount, or none.
        if mount_of(fd) != number:
            raise HelperError("operation_failed", f"the mount {place[:200]!r} cannot be reached")
        _check(_libc.umount2(f"/proc/self/fd/{fd}".encode(), _MNT_DETACH))
    finally:
        os.close(fd)


def _mount(source: str | None, target: str, flags: int) -> None:
    name = None if source is None else os.fsencode(source)
    _check(_libc.mount(name, os.fsencode(target), None, ctypes.c_ulong(flags), None))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)
