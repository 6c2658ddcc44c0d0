"""The jail of a microVM: `<base>/firecracker/<vm_id>/root`, as the jailer lays it out.

It lives from `prepare` to `release`. Until Firecracker itself runs in it, only root can look into
it: the jailer works there as root and follows what it finds, so nobody may plant anything. Later
its content is the owner's, and is removed as such: by descriptor, never through a link or a mount.
Sources: umount(2), proc(5), Firecracker docs/jailer.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat

from banger_root import mounts
from banger_root.errors import HelperError
from banger_root.paths import DIRECTORY, open_directory, split_path

# The jailer names the first level after the program that it runs.
PROGRAM = "firecracker"
_ID = re.compile(r"[0-9a-f]{32}")


def jail_root(base: str, vm_id: str) -> str:
    """The path of the directory that is `/` in a VM's jail."""
    assert _ID.fullmatch(vm_id)
    return f"{base}/{PROGRAM}/{vm_id}/root"


def check_base(base: str, *, owner_uid: int = 0) -> None:
    """Refuse a place where a jail would not hold, or would not work.

    A missing base is made, in a directory that exists.

    Raises:
        HelperError: it can be changed by others than root, is mounted nodev or noexec, or the
            owner could not reach a socket in it.
    """
    fd = _open_base(base)
    try:
        flags = os.fstatvfs(fd).f_flag
        wrong = [
            name for bit, name in ((os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec")) if flags & bit
        ]
        if wrong:
            raise HelperError(
                "operation_failed",
                f"the jail base {base} is mounted {' and '.join(wrong)}: a jail needs device nodes "
                f"and runs a program",
                hint=f"findmnt -T {base}",
            )
    finally:
        os.close(fd)
    if owner_uid == 0:
        return
    parts = split_path(base)
    for depth in range(1, len(parts) + 1):
        directory = "/" + "/".join(parts[:depth])
        if not os.stat(directory).st_mode & 0o001:
            raise HelperError(
                "operation_failed",
                f"the jail base {base} cannot be reached by uid {owner_uid}: {directory} is not "
                f"searchable by others",
                hint=f"sudo chmod o+x {directory}",
            )


def make_jail(base: str, vm_id: str) -> str:
    """Make an empty jail, in place of one that an earlier life left; return its root.

    The root and the directory around it are root's and closed to everyone else (0700).

    Raises:
        HelperError: the base is not to be trusted, or the kernel refused.
    """
    root = jail_root(base, vm_id)
    doing = f"making the jail {root}"
    remove_jail(base, vm_id)
    check_base(base)
    try:
        with contextlib.ExitStack() as stack:
            fd = _open_base(base)
            stack.callback(os.close, fd)
            for name, mode in ((PROGRAM, 0o711), (vm_id, 0o700), ("root", 0o700)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=fd)
                fd = os.open(name, DIRECTORY, dir_fd=fd)
                stack.callback(os.close, fd)
                found = os.fstat(fd)
                if found.st_uid != 0:
                    raise HelperError(
                        "unauthorized", f"{doing}: {name} in it belongs to uid {found.st_uid}"
                    )
                # Whatever the umask is, and whatever an earlier version gave it.
                os.fchmod(fd, mode)
    except OSError as e:
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
    return root


def open_to_owner(base: str, vm_id: str) -> None:
    """Let the owner reach the root of a jail: the jailer is done with it.

    Raises:
        HelperError
    """
    fd = open_directory(os.path.dirname(jail_root(base, vm_id)), trusted=True, sticky_ok=True)
    try:
        os.fchmod(fd, 0o711)
    finally:
        os.close(fd)


def remove_jail(base: str, vm_id: str) -> None:
    """Remove a jail with all its content, whatever the owner made of it; absent is fine.

    What is mounted in it here is unmounted first; what cannot be is an error, not deleted.

    Raises:
        HelperError: the base is not to be trusted, something is mounted in the jail and busy, or
            the kernel refused.
    """
    jail = os.path.dirname(jail_root(base, vm_id))
    doing = f"removing the jail {jail}"
    try:
        os.stat(base, follow_symlinks=False)
    except FileNotFoundError:
        return
    try:
        with contextlib.ExitStack() as stack:
            fd = _open_base(base)
            stack.callback(os.close, fd)
            try:
                level = os.open(PROGRAM, DIRECTORY, dir_fd=fd)
                stack.callback(os.close, level)
                top = os.open(vm_id, DIRECTORY, dir_fd=level)
                stack.callback(os.close, top)
            except FileNotFoundError:
                return
            mounts.unmount_below(jail)
            _empty(top, doing)
            os.rmdir(vm_id, dir_fd=level)
    except OSError as e:
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e


def _open_base(base: str) -> int:
    made = False
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.mkdir(base, 0o700)
        made = True
    fd = open_directory(base, trusted=True, sticky_ok=True)
    if made:
        os.fchmod(fd, 0o711)
    return fd


def _empty(top: int, doing: str) -> None:
    """Delete everything in a directory.

    A tree can be deeper than a process can have descriptors, or paths be long: so each directory
    is taken apart in the top one, which only root can use, and its children are moved up there.
    """
    _take_over(top)
    mount = mounts.mount_of(top)
    moved = 0
    prefix = f".{os.urandom(8).hex()}-"
    while names := os.listdir(top):
        for name in names:
            if _unlink(name, top):
                continue
            fd = os.open(name, DIRECTORY, dir_fd=top)
            try:
                if mounts.mount_of(fd) != mount:
                    raise HelperError("operation_failed", f"{doing}: a mount in it is busy")
                _take_over(fd)
                for child in os.listdir(fd):
                    if not _unlink(child, fd):
                        os.rename(child, f"{prefix}{moved}", src_dir_fd=fd, dst_dir_fd=top)
                        moved += 1
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=top)


def _take_over(fd: int) -> None:
    """From here on nobody adds to a directory, also through a descriptor that is open already."""
    os.fchown(fd, 0, 0)
    os.fchmod(fd, 0o700)


def _unlink(name: str, directory: int) -> bool:
    """Delete an entry; False where it is a directory with something in it."""
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=directory)
        return True
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
