"""One cgroup v2 directory per microVM: everything in it can be killed at once.

`<mount>/banger/<vm_id>` lives from `prepare` to `release`, independent of every process. The mount
may have no controllers (hybrid hosts): killing works there all the same. Source: cgroups(7),
Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import time

from banger_root.errors import HelperError

PARENT = "banger"
_MARK = "trusted.banger"
# Those of the bounds that `scope` sets.
_CONTROLLERS = ("pids", "memory", "cpu")


def find_mount() -> str | None:
    """Where the cgroup v2 hierarchy is mounted, or None. Source: proc(5), mountinfo."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields, _, rest = line.partition(" - ")
            if rest.split(" ", 1)[0] == "cgroup2":
                return _unescape(fields.split(" ")[4])
    return None


def find_directory(vm_id: str) -> str | None:
    """The path that a VM's cgroup has or would have; None without cgroup v2."""
    mount = find_mount()
    return None if mount is None else os.path.join(mount, PARENT, vm_id)


def make_cgroup(vm_id: str, *, mark: str = "") -> str | None:
    """Make the cgroup of a VM, with those controllers that are to be had here.

    `mark` is written on it, so that `find_marked` finds it again. Returns None where cgroup v2 is
    not there or not writable (an ordinary container).

    Raises:
        HelperError: the kernel refused for another reason.
    """
    path = find_directory(vm_id)
    if path is None:
        return None
    parent = os.path.dirname(path)
    doing = f"making the cgroup {path}"
    try:
        for directory in (parent, path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o755)
            if directory == parent:
                _enable(parent)
    except OSError as e:
        if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
    if mark:
        # Where attributes cannot be kept a lost cgroup stays, empty.
        with contextlib.suppress(OSError):
            os.setxattr(path, _MARK, mark.encode())
    return path


def find_marked(mark: str) -> list[str]:
    """The paths of the cgroups that carry a mark."""
    mount = find_mount()
    found = []
    if mount is not None:
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(os.path.join(mount, PARENT)):
                with contextlib.suppress(OSError):
                    if entry.is_dir() and os.getxattr(entry.path, _MARK) == mark.encode():
                        found.append(entry.path)
    return sorted(found)


def refuse_populated(vm_id: str) -> None:
    """Refuse to go on while processes of an earlier life of this VM are in its cgroup.

    Raises:
        HelperError: reason in_use.
    """
    path = find_directory(vm_id)
    if path is not None and is_populated(path):
        raise HelperError(
            "already_exists",
            f"making the cgroup {path}: processes of this VM are still in it",
            hint=f"cat {path}/cgroup.procs",
            reason="in_use",
        )


def is_populated(path: str) -> bool:
    """Whether a live process is in the cgroup; a cgroup that is gone has none."""
    try:
        with open(os.path.join(path, "cgroup.events"), encoding="ascii") as f:
            return "populated 1" in f.read()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENODEV):
            return False
        raise


def kill_cgroup(path: str, *, timeout_s: float = 60.0) -> None:
    """Kill every process in the cgroup and wait until the last one is gone.

    Raises:
        HelperError: some are still there after `timeout_s` (a process in an uninterruptible wait).
    """
    try:
        fd = os.open(os.path.join(path, "cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        poll = select.poll()
        # cgroup.events signals a change as an exceptional condition (cgroup-v2.rst, [Un]populated).
        poll.register(fd, select.POLLPRI | select.POLLERR)
        deadline = time.monotonic() + timeout_s
        while b"populated 1" in os.pread(fd, 4096, 0):
            _write(os.path.join(path, "cgroup.kill"), "1")
            left = deadline - time.monotonic()
            if left <= 0:
                raise HelperError(
                    "operation_failed",
                    f"killing the processes in {path}: some are still there after {timeout_s:g} s",
                    hint=f"cat {path}/cgroup.procs",
                )
            # At most a second, then kill again: a fork may have raced with the first kill.
            poll.poll(min(left, 1.0) * 1000)
    except OSError as e:
        if e.errno != errno.ENODEV:  # removed meanwhile
            raise
    finally:
        os.close(fd)


def remove_cgroup(path: str) -> None:
    """Remove an empty cgroup, and banger's own directory with the last one.

    Raises:
        OSError: EBUSY: a process is in it.
    """
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)
    try:
        os.rmdir(os.path.dirname(path))
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY):
            raise


def _enable(parent: str) -> None:
    """Hand controllers on to our children, where our parent handed them to us."""
    with open(os.path.join(parent, "cgroup.controllers"), encoding="ascii") as f:
        available = f.read().split()
    for controller in _CONTROLLERS:
        if controller in available:
            try:
                _write(os.path.join(parent, "cgroup.subtree_control"), f"+{controller}")
            except OSError as e:
                # One that real-time processes keep from being divided: that bound is not there.
                if e.errno not in (errno.EINVAL, errno.EBUSY):
                    raise


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)
