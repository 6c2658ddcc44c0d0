"""The machine of a VM, found on the host itself: for when what was recorded of it is lost.

A machine is known by the VM's lease: the root helper launched it there, or it is in the lease's
cgroup; else by its working directory, which is the VM's own. Nothing here changes anything.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.guest.client import GuestClient, Health
from banger.guest.config import AGENT_PORT
from banger.guest.endpoint import TcpEndpoint, VsockEndpoint
from banger.host.vmm_process import ProcessRef, find_process, is_alive
from banger.vm.handles import Handles, read_secrets
from banger.vm.plan import build_lease_plan
from banger.vmm.machine import VSOCK_SOCKET

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.config.paths import VmPaths
    from banger.host.lease import LeaseStatus
    from banger.vm.context import VmContext

# A guest that runs answers at once; one that is just booting is nobody's yet.
_ASK_S = 2.0


def find_machine(paths: VmPaths, lease: LeaseStatus | None = None) -> ProcessRef | None:
    """The VMM of a VM, None when none runs."""
    return find_in_lease(lease) or find_machines(paths.runtime.parent).get(paths.runtime.name)


def find_in_lease(lease: LeaseStatus | None) -> ProcessRef | None:
    """The process that the helper launched in a lease, else the one in its cgroup, where a VMM is
    alone."""
    if lease is None:
        return None
    if lease.pid is not None and lease.start_time is not None:
        launched = ProcessRef(pid=lease.pid, start_time=lease.start_time, boot_id=lease.boot_id)
        if is_alive(launched):
            return launched
    if lease.cgroup is None:
        return None
    try:
        words = (Path(lease.cgroup) / "cgroup.procs").read_text().split()
    except OSError:
        return None
    found = (find_process(int(word)) for word in words)
    return next((process for process in found if process is not None), None)


def find_machines(directory: Path) -> dict[str, ProcessRef]:
    """The processes that work in a directory of `directory`, by the name of that one.

    Not those in a jail: their working directory is not ours to read.
    """
    machines = {}
    above = f"{directory}/"
    for name in os.listdir("/proc"):  # noqa: PTH208 - a Path for each process is slow
        if not name.isdigit():
            continue
        try:
            where = os.readlink(f"/proc/{name}/cwd")  # noqa: PTH115 - as above
        except OSError:  # somebody else's, or it has ended
            continue
        below = where.removeprefix(above).removesuffix(" (deleted)")
        if where.startswith(above) and "/" not in below:
            if (process := find_process(int(name))) is not None:
                machines[below] = process
    return machines


def living(handles: Handles | None) -> ProcessRef | None:
    """The process that is recorded, if it lives."""
    process = handles.process if handles is not None else None
    return process if process is not None and is_alive(process) else None


async def rebuild_handles(
    ctx: VmContext, vm: VmRecord, lease: LeaseStatus | None, process: ProcessRef
) -> Handles | None:
    """What a running VM holds, from its row, the ledger and the machine; None: not to be known."""
    if vm.vmm is None or (vm.network == "bridge") != (lease is not None):
        return None
    driver = await ctx.driver()
    if driver.name != vm.vmm:
        return None
    jailing = await ctx.jailing() if vm.vmm == "firecracker" else None
    paths = ctx.vm_paths(vm.id)
    if driver.capabilities.vsock == "unix":
        runtime = paths.runtime if jailing is None else jailing.root(vm.id)
        endpoint: VsockEndpoint | TcpEndpoint = VsockEndpoint(
            path=str(runtime / VSOCK_SOCKET), port=AGENT_PORT
        )
    elif vm.network == "bridge":
        endpoint = TcpEndpoint(address=vm.address, port=AGENT_PORT)
    else:
        return None  # the port that QEMU forwards was chosen by chance
    if lease is None:
        return Handles(vmm=vm.vmm, endpoint=endpoint, process=process)
    return Handles(
        vmm=vm.vmm,
        endpoint=endpoint,
        lease_id=lease.id,
        lease=build_lease_plan(vm, ctx.settings, jail=jailing is not None),
        tap=lease.tap,
        cgroup=lease.cgroup,
        process=process,
    )


async def ask(ctx: VmContext, vm: VmRecord, handles: Handles) -> Health | None:
    """What the guest says of itself; None when it does not answer."""
    try:
        client = GuestClient(handles.endpoint, read_secrets(ctx.vm_paths(vm.id)).token)
        return await client.call("health", {}, Health, timeout_s=_ASK_S, connect_s=_ASK_S)
    except BangerError:
        return None


def began_after(process: ProcessRef, moment: str) -> bool:
    """Whether a process was started after a time of a record (RFC 3339); a second of slack."""
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    age_s = uptime_s - process.start_time / os.sysconf("SC_CLK_TCK")
    written = datetime.fromisoformat(moment)
    return (datetime.now(UTC) - written).total_seconds() + 1 >= age_s
