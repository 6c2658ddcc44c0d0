"""`daemon.doctor`: what only a running daemon knows, and the mending that needs its locks."""

from __future__ import annotations

import logging
import os
import time
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from banger import __version__
from banger.api.doctor import DoctorFacts, TriedLease
from banger.api.records import VmRecord
from banger.doctor.helper import ask_helper
from banger.doctor.world import settings_hash
from banger.errors import BangerError
from banger.host.lease import Bridge, derive_mac
from banger.names import new_vm_id
from banger.vm.cleanup import is_live
from banger.vm.plan import build_lease_plan
from banger.vm.reconcile import reconcile

if TYPE_CHECKING:
    from banger.api.params import Doctor
    from banger.daemon.daemon import Daemon
    from banger.rpc.server import Call

log = logging.getLogger(__name__)

# What bounds the lease of a small VM; none runs in it.
_TRIED_MEMORY_MIB = 128


async def doctor(daemon: Daemon, call: Call, params: Doctor) -> DoctorFacts:
    """Look; with `sweep` give back what no VM uses first; with `try_lease` make and release one."""
    swept = await _sweep(daemon) if params.sweep else ()
    tried = await _try_lease(daemon) if params.try_lease else None
    names = daemon.names
    # Before and after: a VM that starts or stops meanwhile holds its lease rightly.
    busy = set(daemon.vms.handles)
    helper = await ask_helper(daemon.host)
    vms = daemon.store.list()
    busy |= {*daemon.vms.handles, *(vm.id for vm in vms if vm.provisional)}
    return DoctorFacts(
        version=__version__,
        pid=os.getpid(),
        network=daemon.network,
        settings_sha256=settings_hash(daemon.settings),
        live=tuple(vm.id for vm in vms if is_live(daemon.vms, vm)),
        busy=tuple(sorted(busy)),
        helper=helper,
        dns=names.listen,
        dns_problem=names.problem,
        routing_problem=names.routing_problem,
        undecided=tuple(daemon.vms.undecided.values()),
        swept=swept,
        tried=tried,
    )


async def _sweep(daemon: Daemon) -> tuple[str, ...]:
    """Make rows, handles, leases and machines agree; one sentence for each thing that was done.

    Raises:
        BangerError: something could not be given back; the rest was.
    """
    done = await reconcile(daemon.vms)
    did, failures = [*done.did], [*done.failures]
    if daemon.host.privilege.kind != "none":
        try:
            swept = await daemon.host.sweep(_pool(daemon))
        except BangerError as e:
            failures.append(str(e))
        else:
            did += [f"released {what}" for what in swept.removed]
    if failures:
        raise BangerError(
            "operation_failed",
            "giving back what no VM uses: " + "; ".join(failures),
            hint="banger vm list",
        )
    return tuple(did)


def _pool(daemon: Daemon) -> Bridge | None:
    """The bridge whose taps the installed helper keeps in store."""
    if daemon.host.privilege.kind != "service":
        return None
    settings = daemon.settings
    return Bridge(name=settings.bridge_name, address=settings.bridge_ip, prefix=settings.cidr)


async def _try_lease(daemon: Daemon) -> TriedLease:
    """Make a lease at the end of the subnet and give it back.

    Raises:
        BangerError: as the helper says; or no address is free.
    """
    settings = daemon.settings
    taken = {vm.address for vm in daemon.store.list()} | {settings.bridge_ip}
    # From the end: VMs take the lowest.
    last = int(settings.subnet.broadcast_address) - 1
    free = (str(IPv4Address(last - n)) for n in range(settings.subnet.num_addresses - 2))
    address = next((a for a in free if a not in taken), None)
    if address is None:
        raise BangerError(
            "operation_failed",
            f"trying a lease: no address is free in {settings.subnet}",
            hint="banger vm prune",
            reason="address_exhausted",
        )
    vm = VmRecord(
        id=new_vm_id(),
        name="doctor",
        state="created",
        image_id="",
        image="",
        kernel="",
        vcpu=1,
        memory_mib=_TRIED_MEMORY_MIB,
        overlay_bytes=0,
        work_disk_bytes=0,
        address=address,
        mac=derive_mac(address),
        network="bridge",
    )
    plan = build_lease_plan(vm, settings, jail=daemon.host.jail_base is not None)
    began = time.perf_counter()
    try:
        lease = await daemon.host.prepare(plan)
        made = time.perf_counter()
    finally:
        # Also after a lost answer: then it may have been made.
        await daemon.host.release(plan.lease_id)
    return TriedLease(
        tap=lease.tap,
        address=address,
        prepare_ms=round((made - began) * 1000, 1),
        release_ms=round((time.perf_counter() - made) * 1000, 1),
    )
