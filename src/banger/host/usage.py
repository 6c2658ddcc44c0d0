"""What a VM uses of the host, read from the kernel's own counters; nothing here needs privilege.

Of the cgroup only what is the VM's alone is taken: in a container, or where no lease made one, the
VMM sits in a cgroup with others. Every counter may be missing; then it is None.
Sources: cgroup-v2.rst, proc_pid_stat(5), proc_pid_io(5), proc_net(5).
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the VMM began; memory as it is now. `cpu_s` and `rss_bytes` are 0 of a process
    that has ended."""

    rss_bytes: int
    cpu_s: float
    tasks: int | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    read_bytes: int | None
    written_bytes: int | None
    sent_bytes: int | None
    received_bytes: int | None


def read_usage(pid: int, vm_id: str, tap: str | None, *, proc: Path = Path("/proc")) -> Usage:
    """What the VMM `pid` of a VM uses, and what went through its tap."""
    process = proc / str(pid)
    group = _find_cgroup(process, vm_id, proc)
    # Fields are counted after the last ')', for the name may hold anything.
    fields = _read(process / "stat").rpartition(")")[2].split()
    rss, cpu_s, tasks = 0, 0.0, None
    if len(fields) > 21:
        rss = int(fields[21]) * _PAGE
        cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS
        tasks = int(fields[17])
    if group is not None:
        # Where the kernel accounts CPU by cgroup, threads that have ended are in it, too.
        usage = _keyed(_read(group / "cpu.stat")).get("usage_usec")
        cpu_s = max(cpu_s, usage / 1e6) if usage is not None else cpu_s
    read, written = _transferred(process, group)
    sent, received = _passed(proc, tap) if tap else (None, None)
    return Usage(
        rss_bytes=rss,
        cpu_s=round(cpu_s, 3),
        tasks=tasks,
        memory_bytes=_number(group / "memory.current") if group else None,
        memory_limit_bytes=_number(group / "memory.max") if group else None,
        read_bytes=read,
        written_bytes=written,
        sent_bytes=sent,
        received_bytes=received,
    )


def _passed(proc: Path, tap: str) -> tuple[int | None, int | None]:
    """Bytes that a guest has sent through its tap, and received."""
    # Of our network namespace whatever is mounted as /sys, where they stand as well.
    for line in _read(proc / "self" / "net" / "dev").splitlines():
        name, _, counters = line.partition(":")
        fields = counters.split()
        if name.strip() == tap and len(fields) > 8:
            # What a tap receives is what its guest sends.
            return int(fields[0]), int(fields[8])
    return None, None


def _find_cgroup(process: Path, vm_id: str, proc: Path) -> Path | None:
    """The cgroup v2 directory that is this VM's own: its name has the VM's id in it."""
    for line in _read(process / "cgroup").splitlines():
        hierarchy, _, path = line.partition("::")
        if hierarchy == "0" and vm_id in path.rsplit("/", 1)[-1]:
            break
    else:
        return None
    for line in _read(proc / "self" / "mountinfo").splitlines():
        words, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            fields = words.split(" ")
            # In a container the mount's root is a directory of the hierarchy.
            inside = os.path.relpath(path, fields[3])
            return Path(fields[4]) / inside if not inside.startswith("..") else None
    return None


def _transferred(process: Path, group: Path | None) -> tuple[int | None, int | None]:
    """Bytes read from and written to block devices."""
    if group is not None and (text := _read(group / "io.stat")):
        rows = [dict(w.split("=", 1) for w in line.split()[1:]) for line in text.splitlines()]
        return (
            sum(int(row.get("rbytes", 0)) for row in rows),
            sum(int(row.get("wbytes", 0)) for row in rows),
        )
    numbers = _keyed(_read(process / "io").replace(":", ""))
    return numbers.get("read_bytes"), numbers.get("write_bytes")


def _keyed(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # memory.max may say "max"


def _read(path: Path) -> str:
    # Absent, ended meanwhile, or not ours to read: all of it means that there is no such number.
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
