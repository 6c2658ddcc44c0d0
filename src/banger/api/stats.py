"""The figures of one VM: what `vm stats` answers, and the last of them in its record."""

from __future__ import annotations

from typing import Any

from banger.api.base import Wire


class VmStats(Wire, frozen=True, kw_only=True):
    """Counters begin at the start of the VM. What this host does not tell is None.

    `vmm_cpu_s` and memory are those of the VM's cgroup where it has one, else of the VMM's process.
    """

    vm: str
    sampled_at: str = ""
    vmm_rss_bytes: int
    """Resident memory of the VMM's process, the guest's included."""
    vmm_cpu_s: float
    cpu_percent: float | None = None
    """Of one CPU, since the figures that were collected before; None for the first ones."""
    memory_bytes: int | None = None
    """What the cgroup is charged with, page cache included."""
    memory_limit_bytes: int | None = None
    tasks: int | None = None
    """Threads of the VMM."""
    disk_read_bytes: int | None = None
    disk_written_bytes: int | None = None
    overlay_allocated_bytes: int
    overlay_promised_bytes: int
    work_allocated_bytes: int
    work_promised_bytes: int
    host_free_bytes: int
    network_sent_bytes: int | None = None
    """By the guest. None on user-mode networking, which has no tap to count at."""
    network_received_bytes: int | None = None
    guest: dict[str, Any] | None
    guest_error: str | None = None
