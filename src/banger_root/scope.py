"""Where a jailed VMM is accounted and bounded: a scope of systemd's, else a cgroup of our own.

A scope is made by the VMM's own process on its way to the jailer and ends with its last process;
it is in `banger.slice`, not in the helper's unit, so that no restart of a service reaches it.
Sources: systemd-run(1), systemd.resource-control(5), sd_booted(3), cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import time

from banger_root import cgroup, process
from banger_root.errors import HelperError

SLICE = "banger.slice"
# Threads of one VMM and its vCPUs, with room; a bound, not a budget.
TASKS_MAX = 256
# What a VMM needs beside its guest's memory, page cache included.
MEMORY_EXTRA_MIB = 256
# The threads that serve the guest's devices may take one CPU more than the guest has.
CPU_EXTRA = 1
_CPU_PERIOD_US = 100_000
# Between two looks at whether systemd has removed a scope's cgroup.
_LOOK_S = 0.005


def has_systemd() -> bool:
    """Whether systemd manages this host (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def name_scope(vm_id: str) -> str:
    """The unit in which a VM runs."""
    return f"banger-vm-{vm_id}.scope"


def find_scope_directory(vm_id: str) -> str | None:
    """The path that the cgroup of a VM's scope has or would have; None without cgroup v2."""
    mount = cgroup.find_mount()
    return None if mount is None else os.path.join(mount, SLICE, name_scope(vm_id))


def build_scope_argv(vm_id: str, *, vcpu: int, memory_mib: int) -> list[str]:
    """The words to put before a program's own, so that it starts in its scope, with the same pid.

    Raises:
        HelperError: systemd-run is not installed.
    """
    program = process.find_program("systemd-run")
    if program is None:
        raise HelperError(
            "operation_failed",
            f"making {name_scope(vm_id)}: systemd runs here, but the program systemd-run is "
            f"not installed",
            hint="sudo apt-get install systemd",
        )
    return [
        program,
        "--scope",
        "--quiet",
        "--no-ask-password",
        # Also a scope whose process failed goes away, so that its name is free again.
        "--collect",
        f"--slice={SLICE}",
        f"--unit={name_scope(vm_id)}",
        f"--property=TasksMax={TASKS_MAX}",
        f"--property=MemoryMax={memory_mib + MEMORY_EXTRA_MIB}M",
        f"--property=CPUQuota={(vcpu + CPU_EXTRA) * 100}%",
        "--",
    ]


def wait_free(vm_id: str, *, timeout_s: float = 20.0) -> None:
    """Wait until systemd has forgotten the scope of an earlier VMM, so that its name is free.

    It removes the cgroup when it does so, some milliseconds after the last process has ended.

    Raises:
        HelperError: reason in_use: a process is in it, or it is still there after `timeout_s`.
    """
    path = find_scope_directory(vm_id)
    deadline = time.monotonic() + timeout_s
    while path is not None and os.path.isdir(path):
        populated = cgroup.is_populated(path)
        if populated or time.monotonic() > deadline:
            raise HelperError(
                "already_exists",
                f"making {name_scope(vm_id)}: there is one, "
                + ("with processes in it" if populated else "which systemd does not let go of"),
                hint=f"systemctl status {name_scope(vm_id)}",
                reason="in_use",
            )
        time.sleep(_LOOK_S)


def bound_cgroup(path: str, *, vcpu: int, memory_mib: int) -> None:
    """Give a cgroup of ours the bounds of a scope, as far as its controllers are there.

    Raises:
        OSError
    """
    bounds = {
        "pids.max": str(TASKS_MAX),
        "memory.max": str((memory_mib + MEMORY_EXTRA_MIB) << 20),
        "cpu.max": f"{(vcpu + CPU_EXTRA) * _CPU_PERIOD_US} {_CPU_PERIOD_US}",
    }
    for name, value in bounds.items():
        with contextlib.suppress(FileNotFoundError):
            _write(os.path.join(path, name), value)


def enter_cgroup(path: str) -> None:
    """Move this process into a cgroup.

    Raises:
        OSError
    """
    _write(os.path.join(path, "cgroup.procs"), "0")


def _write(path: str, text: str) -> None:
    # Without O_CREAT: in a cgroup that would turn "no such file" into "permission denied".
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
