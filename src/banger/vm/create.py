"""Create: name, address, row, secrets; then start. A failure leaves no row, lease or file."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

import msgspec

from banger.api.records import ImageRecord, OwnerProcess, VmRecord
from banger.config.settings import host_memory_mib
from banger.errors import BangerError, is_disk_full
from banger.faults import step
from banger.files import ensure_private_directory, remove_tree, sync_directory, write_atomic
from banger.host.lease import derive_mac
from banger.names import check_vm_name, new_vm_id
from banger.ssh.keys import generate_key
from banger.ssh.known_hosts import replace_host
from banger.store.vms import now_text
from banger.units import GIB, MIB, format_size
from banger.vm import admission
from banger.vm.handles import Secrets
from banger.vm.start import start
from banger.vm.threads import finish_in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from banger.api.params import CreateVm
    from banger.config.paths import VmPaths
    from banger.progress import Reporter
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)

ASIDE = ".delete-"
"""Where a VM's directory goes while it is deleted: this and the VM's id."""
_MOST_VCPU = 32
_LEAST_MEMORY_MIB = 128
_MOST_DISK = 128 * GIB
_LEAST_DISK = 64 * MIB
_USER_MAC = "06:00:0a:00:02:0f"


def check_create(params: CreateVm) -> None:
    """Refuse what can be refused without looking at anything but the request and the host's size.

    Raises:
        BangerError: bad_request, naming the flag and what is allowed.
    """
    if params.name is not None:
        check_vm_name(params.name)
    host_mib = host_memory_mib()
    check_sizes(params.vcpu, params.memory_mib, params.disk_bytes, params.overlay_bytes)
    if params.memory_mib > host_mib:
        raise _refused(
            "--memory", f"{params.memory_mib} MiB", f"at most this host's {host_mib} MiB"
        )


def check_sizes(
    vcpu: int | None, memory_mib: int | None, disk_bytes: int | None, overlay_bytes: int | None
) -> None:
    """Raises BangerError, bad_request, for the first size out of range; None is not looked at."""
    if vcpu is not None and not 1 <= vcpu <= _MOST_VCPU:
        raise _refused("--vcpu", str(vcpu), f"1 to {_MOST_VCPU}")
    if memory_mib is not None and memory_mib < _LEAST_MEMORY_MIB:
        raise _refused("--memory", f"{memory_mib} MiB", f"{_LEAST_MEMORY_MIB} MiB or more")
    for flag, size in (("--disk-size", disk_bytes), ("--system-overlay-size", overlay_bytes)):
        if size is not None and not _LEAST_DISK <= size <= _MOST_DISK:
            raise _refused(
                flag,
                format_size(max(size, 0)),
                f"{format_size(_LEAST_DISK)} to {format_size(_MOST_DISK)}",
            )


def _refused(flag: str, value: str, allowed: str) -> BangerError:
    return BangerError(
        "bad_request", f"{flag} {value} is out of range: {allowed}", hint="banger vm run --help"
    )


async def create(
    ctx: VmContext,
    params: CreateVm,
    image: ImageRecord,
    report: Reporter,
    *,
    owner: OwnerProcess | None = None,
    building: bool = False,
) -> VmRecord:
    """Reserve and, unless `params.start` is false, start a VM of an image that is present.

    `owner` makes it ephemeral: deleted when that process has ended. `building`: it is one that an
    image is made of.

    Raises:
        BangerError: nothing of the VM is left then, except with reason guest_not_ready, and where
            the rollback failed: it stays in state error, so that it can be deleted.
    """
    admission.check_disk(ctx, "creating a VM")
    if image.install_sshd and not params.nat and not building:
        report.warn(
            f"the image {image.name} installs its sshd over the network, and the VM would have "
            "none: no sshd is installed; see --nat"
        )
    report.stage("reserve", "reserving name and address")

    vm_id = new_vm_id()

    def build(name: str, address: str) -> VmRecord:
        now = now_text()
        return VmRecord(
            id=vm_id,
            name=name,
            state="created",
            image_id=image.id,
            image=image.name,
            kernel=image.kernel_ref,
            vcpu=params.vcpu,
            memory_mib=params.memory_mib,
            overlay_bytes=params.overlay_bytes,
            work_disk_bytes=params.disk_bytes,
            address=address,
            mac=derive_mac(address) if address else _USER_MAC,
            network=ctx.network,
            nat=params.nat,
            ephemeral=owner is not None,
            owner=owner,
            building=building,
            provisional=True,
            created_at=now,
            updated_at=now,
            touched_at=now,
        )

    async with ctx.locked(vm_id):
        try:
            async with step("create.reserve"):
                vm = ctx.store.reserve(
                    params.name,
                    ctx.settings.subnet if ctx.network == "bridge" else None,
                    frozenset({ctx.settings.bridge_ip}),
                    build,
                )
            async with step("create.secrets"):
                _make_secrets(ctx.vm_paths(vm.id), vm.name)
            if not params.start:
                return ctx.store.update(vm.id, provisional=False)
            return await start(ctx, vm, report, allow_overcommit=params.allow_overcommit)
        except BaseException as e:
            now = ctx.store.find(vm_id)
            if now is not None:
                kept = isinstance(e, BangerError) and e.reason == "guest_not_ready"
                if kept and not building:
                    # Its console is wanted: it waits for `vm logs` and `vm delete`.
                    ctx.store.update(vm_id, ephemeral=False, owner=None)
                elif now.state != "error":
                    await forget_vm(ctx, now)
                else:
                    # It is listed from now on, and stays until somebody deletes it.
                    ctx.store.update(vm_id, provisional=False)
            raise


def _make_secrets(paths: VmPaths, name: str) -> None:
    ensure_private_directory(paths.directory)
    key = generate_key(name)
    made = Secrets(token=secrets.token_hex(32), host_key=key.private, host_key_pub=key.public)
    write_atomic(paths.secrets, msgspec.json.encode(made))


async def forget_vm(ctx: VmContext, vm: VmRecord) -> None:
    """Remove a VM that holds nothing any more: known_hosts lines, directory, row.

    Its directory goes out of sight by one rename, before its row: killed at any moment, either the
    VM is whole or the next daemon ends what was begun. Nobody meets a VM without its disks. On a
    full disk the directory makes room for the rest.
    """
    hosts = _hosts_of(vm)
    directory = ctx.vm_paths(vm.id).directory
    aside = directory.with_name(f"{ASIDE}{vm.id}")
    full = False
    try:
        async with step("delete.known_hosts"):
            replace_host(ctx.paths.known_hosts, hosts, None)
    except OSError as e:
        full = is_disk_full(e)
        if not full:
            raise
    try:
        async with step("delete.aside"):
            if directory.exists():
                if aside.exists():
                    await finish_in_thread(remove_tree, aside)
                directory.rename(aside)
                # Or a power cut might take the row alone, and leave disks that are nobody's.
                sync_directory(aside.parent)
        async with step("delete.row"):
            await _delete_row(ctx, vm, aside)
    except BaseException:
        if ctx.store.find(vm.id) is None:
            await finish_in_thread(remove_tree, aside)
        elif aside.exists():
            aside.rename(directory)
        raise
    try:
        async with step("delete.files"):
            # A large file goes extent by extent, which takes ext4 seconds.
            await finish_in_thread(remove_tree, aside)
    except (BangerError, OSError) as e:
        # The VM is gone; what is left of it takes room, and doctor says so.
        log.warning("removing what is left of VM %s in %s: %s", vm.name, aside, e)
    finally:
        if full:
            # Meanwhile another VM may have got its name or its address.
            used = {x for other in ctx.store.list() for x in _hosts_of(other)}
            replace_host(ctx.paths.known_hosts, set(hosts) - used, None)


def _hosts_of(vm: VmRecord) -> list[str]:
    return [f"{vm.name}.vm", *([vm.address] if vm.address else [])]


async def _delete_row(ctx: VmContext, vm: VmRecord, aside: Path) -> None:
    try:
        ctx.store.delete(vm.id)
    except BangerError as e:
        if e.reason != "disk_full":
            raise
        try:
            await finish_in_thread(remove_tree, aside)
        finally:
            # Also when cancelled: a VM without its disks is none.
            ctx.store.delete(vm.id)
