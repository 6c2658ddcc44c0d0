"""A launched VMM, as the ledger knows it: found, signalled and ended, and never another process.

A pid alone could have been given to somebody else since. So a pidfd is opened first, and the start
time compared after that: from then on the descriptor means that very process, or none. Of a lease
that is older than this boot neither says anything.
Sources: pidfd_open(2), pidfd_send_signal(2), proc(5), cgroups(7).
"""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

from banger_root import cgroup, scope
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from banger_root.ledger import Entry


def read_start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None when there is none, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            text = f.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, also parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def read_boot_id() -> str:
    """The name of this boot: what another kernel had is gone. Source: random(4)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        return f.read().strip()


def open_vmm(entry: Entry) -> int | None:
    """A pidfd of the lease's VMM; None where none was launched, or it has ended."""
    if entry.pid is None or entry.start_time is None:
        return None
    if entry.boot_id not in (None, read_boot_id()):
        return None
    try:
        fd = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return None
    if read_start_time(entry.pid) != entry.start_time:
        os.close(fd)
        return None
    return fd


def is_running(entry: Entry) -> bool:
    """Whether the lease's VMM runs, or anything is in the scope that was made for it."""
    fd = open_vmm(entry)
    if fd is not None:
        os.close(fd)
        return True
    path = scope.find_scope_directory(entry.id) if entry.scope is not None else None
    return path is not None and cgroup.is_populated(path)


def send_signal(entry: Entry, name: str) -> None:
    """Send a signal, named without SIG, to the lease's VMM.

    Raises:
        HelperError: not_running: none was launched, or it has ended.
    """
    fd = open_vmm(entry)
    if fd is not None:
        try:
            signal.pidfd_send_signal(fd, signal.Signals[f"SIG{name}"])
            return
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
    raise HelperError("not_running", f"sending {name} to the VMM of VM {entry.id}: it does not run")


def kill(entry: Entry, *, timeout_s: float = 60.0) -> None:
    """Kill the lease's VMM with everything in its scope, and wait until the last one is gone.

    None having been launched is fine. A cgroup of the lease's own is not touched.

    Raises:
        HelperError: it is still there after `timeout_s` (an uninterruptible wait).
        OSError
    """
    fd = open_vmm(entry)
    try:
        if fd is not None:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        path = scope.find_scope_directory(entry.id) if entry.scope is not None else None
        if path is not None:
            cgroup.kill_cgroup(path, timeout_s=timeout_s)
        if fd is not None and not wait_exit(fd, timeout_s=timeout_s):
            raise HelperError(
                "operation_failed",
                f"killing the VMM of VM {entry.id} (pid {entry.pid}): it is still there after "
                f"{timeout_s:g} s",
                hint=f"sudo cat /proc/{entry.pid}/stack",
            )
    finally:
        if fd is not None:
            os.close(fd)


def wait_exit(fd: int, *, timeout_s: float) -> bool:
    """Wait until the process of a pidfd has ended; False where it has not in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
