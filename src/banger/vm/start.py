"""Start: from a record to a running VM, room by room, with one undo stack.

    plan → disks → lease → handles → launch → ready → file_sync → publish

Information flows one way. The VMM that comes out belongs to nobody's request; a cancelled call
rolls back what it acquired, and after `publish` there is nothing left to roll back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from banger.disk.blank import Role, extend_disk, write_blank_disk
from banger.disk.initrd import write_vm_initrd
from banger.errors import BangerError, is_disk_full
from banger.faults import step
from banger.files import ensure_private_directory
from banger.guest.client import GuestClient
from banger.guest.config import CONFIG_MEMBER
from banger.host import clock
from banger.host.lease import derive_mac
from banger.host.uplink import find_uplink_mtu
from banger.host.vmm_process import ExitStatus, ProcessRef, launch_vmm, wait_exit
from banger.image.entries import check_image_files, get_image
from banger.kernel.entries import check_kernel_files, get_kernel
from banger.kernel.pull import ensure_base_initrd
from banger.ssh.known_hosts import replace_host
from banger.store.vms import now_text
from banger.vm import admission, console
from banger.vm.cleanup import handles_of, is_live, release_everything, reset
from banger.vm.file_sync import choose_entries, plan_file_sync, send_files
from banger.vm.handles import Handles, read_secrets, write_handles
from banger.vm.plan import StartPlan, build_start_plan
from banger.vm.space import send_time
from banger.vm.threads import finish_in_thread
from banger.vm.undo import Undo
from banger.vmm.driver import remove_stale_sockets

if TYPE_CHECKING:
    from banger.api.records import ImageRecord, KernelRecord, VmRecord
    from banger.guest.announce import Announcement
    from banger.progress import Reporter
    from banger.vm.context import VmContext
    from banger.vmm.driver import Driver

log = logging.getLogger(__name__)

_CONSOLE_LINES = 40


async def start(
    ctx: VmContext, vm: VmRecord, report: Reporter, *, allow_overcommit: bool
) -> VmRecord:
    """Start a VM whose lock the caller holds; return its running record.

    Raises:
        BangerError: whatever stage failed; everything it had acquired was given back.
            reason guest_not_ready: the VM runs but did not announce itself; it is kept.
    """
    if is_live(ctx, vm):
        return vm
    if vm.id in ctx.undecided:
        # Whatever runs there is not ended by a start, which nobody gives to lose something.
        raise BangerError(
            "operation_failed",
            f"starting VM {vm.name}: {ctx.undecided[vm.id].what}",
            hint=ctx.undecided[vm.id].command,
        )
    _refuse_lost(ctx, vm)
    # What an earlier run left (a daemon killed half-way, a VMM that died) goes first.
    async with step("start.clean"):
        failures = await release_everything(ctx, vm.id, handles_of(ctx, vm.id))
    if failures:
        raise BangerError(
            "operation_failed",
            f"starting VM {vm.name}: what it held before could not be given back: "
            + "; ".join(failures),
            hint=f"banger vm kill {vm.name}",
        )
    timer = _StageTimer(report)
    vm = _ensure_address(ctx, vm)
    driver = await ctx.driver()
    image, kernel = await asyncio.to_thread(_check_files, ctx, vm)
    admission.check_memory(ctx, vm, allow_overcommit=allow_overcommit)
    wanted = admission.start_bytes(ctx, vm, kernel)
    admission.check_disk(ctx, f"starting VM {vm.name}", wanted)
    timer.stage("plan", "planning")
    async with step("start.plan"):
        plan = await _plan(ctx, vm, image, kernel, driver)
    synced = () if vm.building else ctx.settings.file_sync
    entries = choose_entries(synced, first_start=not vm.files_synced)
    files = await asyncio.to_thread(plan_file_sync, entries, ctx.home)
    for warning in files.warnings:
        report.warn(warning)
    console_start = _size(plan)
    async with Undo() as undo:
        # Registered first, because every step from here on leaves something that this gives back.
        undo.push("what it held", lambda: _release(ctx, vm))
        timer.stage("disks", "preparing disks")
        async with step("start.disks"):
            await finish_in_thread(_make_disks, ctx, plan)

        handles = Handles(vmm=driver.name, endpoint=plan.endpoint)
        if plan.lease is not None:
            timer.stage("lease", "connecting the network")
            async with step("start.lease"):
                lease = await ctx.host.prepare(plan.lease)
            handles = Handles(
                vmm=driver.name,
                endpoint=plan.endpoint,
                lease_id=lease.id,
                lease=plan.lease,
                tap=lease.tap,
                cgroup=lease.cgroup,
            )
            plan = plan.with_tap(lease.tap)
        timer.stage("handles", "recording what it holds")
        async with step("start.handles"):
            write_handles(plan.paths, handles)
            ctx.handles[vm.id] = handles

        with contextlib.ExitStack() as listening:
            announced = listening.enter_context(
                ctx.announcements.expect(vm.id, plan.guest_config.token)
            )
            # The guest is told the time once, when it announces itself; in the record, and so known
            # to those who look for jumps of the clocks, it is later.
            clocks = clock.read_clocks()
            timer.stage("launch", f"starting {driver.name}")
            async with step("start.launch"):
                process = await _launch(ctx, plan, driver, handles.cgroup, listening, console_start)
            async with step("start.process"):
                handles = msgspec.structs.replace(handles, process=process)
                ctx.handles[vm.id] = handles
                write_handles(plan.paths, handles)
            ended = asyncio.Event()
            exited = asyncio.ensure_future(wait_exit(process))
            exited.add_done_callback(lambda _: ended.set())
            try:
                try:
                    async with step("start.configure"):
                        await driver.start(plan.machine, ended, timeout_s=plan.ready_timeout_s)
                except BangerError as e:
                    if e.reason == "vmm_exited" and exited.done():
                        raise _ended(plan, exited.result(), console_start) from e
                    raise
                if driver.capabilities.copies_initrd:
                    # It has the guest's secrets, and takes more of the disk than all else of a VM
                    # that has not written yet. Truncated: the jail holds the file itself.
                    await asyncio.to_thread(os.truncate, plan.paths.initrd, 0)
                timer.stage("ready", "waiting for the guest")
                async with step("start.ready"):
                    announcement = await _ready(announced, exited, plan, console_start)
                if files.members:
                    timer.stage("file_sync", "copying files of your home")
                    client = GuestClient(plan.endpoint, plan.guest_config.token)
                    async with step("start.file_sync"):
                        await send_files(client, files, exited, vm.name)
            except BangerError as e:
                if e.reason == "guest_not_ready" and not vm.building:
                    # It may still come up: the VM is kept, its console tells more.
                    _publish(ctx, vm, driver, process, None)
                    undo.keep()
                raise
            finally:
                if not exited.done():
                    exited.cancel()
                    await asyncio.gather(exited, return_exceptions=True)
        timer.stage("publish", "ready")
        async with step("start.publish"):
            running = _publish(ctx, vm, driver, process, announcement)
        # Not before: a record that cannot be written must not leave a machine that nobody knows.
        undo.keep()
    if clock.find_jump(clocks, clock.read_clocks()) is not None:
        await send_time(ctx, running)
    timer.log(vm)
    if plan.lease is not None:
        # Not before: on a small host it would take from the guest's boot.
        ctx.host.refill(plan.lease.bridge)
    return running


def _refuse_lost(ctx: VmContext, vm: VmRecord) -> None:
    """A VM that has run keeps its disks, or does not start: an empty one is not what it was.

    Raises:
        BangerError: reason disk_missing.
    """
    if vm.vmm is None:
        return
    paths = ctx.vm_paths(vm.id)
    lost = [str(disk) for disk in (paths.work, paths.overlay) if not disk.exists()]
    if lost:
        raise BangerError(
            "operation_failed",
            f"starting VM {vm.name}: {' and '.join(lost)} is missing, with what the VM had written "
            "there; put it back from a backup, or delete the VM: no empty disk takes its place",
            hint=f"banger vm delete {vm.name}",
            reason="disk_missing",
        )


def _ensure_address(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """The bridge's subnet may be another one since the last start: then the address is, too."""
    subnet = ctx.settings.subnet
    if vm.network != "bridge" or (
        ipaddress.IPv4Address(vm.address) in subnet and vm.address != ctx.settings.bridge_ip
    ):
        return vm
    old = vm.address
    vm = ctx.store.readdress(
        vm.id,
        subnet,
        frozenset({ctx.settings.bridge_ip}),
        lambda record, address: msgspec.structs.replace(
            record, address=address, mac=derive_mac(address)
        ),
    )
    replace_host(ctx.paths.known_hosts, [old], None)
    log.info("VM %s has the address %s instead of %s", vm.name, vm.address, old)
    return vm


def _check_files(ctx: VmContext, vm: VmRecord) -> tuple[ImageRecord, KernelRecord]:
    image = get_image(ctx.paths, vm.image_id)
    check_image_files(ctx.paths, image)
    kernel = ensure_base_initrd(ctx.paths, get_kernel(ctx.paths, vm.kernel))
    check_kernel_files(kernel)
    return image, kernel


async def _plan(
    ctx: VmContext, vm: VmRecord, image: ImageRecord, kernel: KernelRecord, driver: Driver
) -> StartPlan:
    return build_start_plan(
        vm=vm,
        paths=ctx.vm_paths(vm.id),
        image=image,
        kernel=kernel,
        secrets=read_secrets(ctx.vm_paths(vm.id)),
        settings=ctx.settings,
        capabilities=driver.capabilities,
        # What a build's machine has of its owner would be in the image.
        authorized_keys=() if vm.building else ctx.authorized_keys(),
        git_identity=None if vm.building else ctx.git_identity(),
        agent_host_port=_free_port() if vm.network == "user" else None,
        jailing=await ctx.jailing() if driver.name == "firecracker" else None,
        uplink_mtu=find_uplink_mtu() if vm.nat else None,
        now_unix_ns=time.time_ns(),
    )


async def _launch(
    ctx: VmContext,
    plan: StartPlan,
    driver: Driver,
    cgroup: str | None,
    listening: contextlib.ExitStack,
    console_start: int,
) -> ProcessRef:
    """The VMM's process; whoever hears its guest's announcement listens when this returns."""
    if plan.launch is not None:
        try:
            process = await ctx.host.launch(plan.launch)
        except BangerError as e:
            if e.reason == "vmm_exited":
                raise _ended(plan, None, console_start) from e
            raise
        # Only now: until the VMM has it, the jail belongs to root. No guest runs before `start`.
        assert plan.announce_path is not None
        listening.enter_context(ctx.announcements.listen_unix(plan.announce_path))
        return process
    if plan.announce_path is not None:
        listening.enter_context(ctx.announcements.listen_unix(plan.announce_path))
    else:
        ctx.announcements.ensure_tcp(ctx.settings.bridge_ip)
    remove_stale_sockets(plan.paths.runtime)
    return await launch_vmm(
        driver.build_launch(plan.machine).argv,
        cwd=plan.paths.runtime,
        console=plan.paths.console,
        cgroup=cgroup,
    )


def _make_disks(ctx: VmContext, plan: StartPlan) -> None:
    """Disks that are missing are cloned; those of an earlier start are kept, grown if asked."""
    paths = plan.paths
    ensure_private_directory(paths.directory)
    paths.runtime.parent.mkdir(mode=0o700, exist_ok=True)
    ensure_private_directory(paths.runtime)
    try:
        disks: tuple[tuple[Role, Path, int], ...] = (
            ("overlay", paths.overlay, plan.vm.overlay_bytes),
            ("work", paths.work, plan.vm.work_disk_bytes),
        )
        for role, target, size in disks:
            if not target.exists():
                write_blank_disk(ctx.paths, role, size, target)
            elif target.stat().st_size < size:
                extend_disk(target, size)
        write_vm_initrd(
            Path(plan.base_initrd), paths.initrd, {CONFIG_MEMBER: plan.guest_config.encode()}
        )
    except OSError as e:
        raise BangerError(
            "operation_failed",
            f"preparing the disks of VM {plan.vm.name} in {paths.directory}: {e.strerror}",
            hint=f"df -h {ctx.paths.state}",
            reason="disk_full" if is_disk_full(e) else None,
        ) from e
    replace_host(
        ctx.paths.known_hosts,
        [f"{plan.vm.name}.vm", *([plan.vm.address] if plan.vm.address else [])],
        plan.guest_config.host_key_pub,
    )


async def _release(ctx: VmContext, vm: VmRecord) -> None:
    # A rollback that was begun is finished, also when its caller is cancelled once more.
    failures = await ctx.finish_alone(
        release_everything(ctx, vm.id, ctx.handles.get(vm.id)), f"undo {vm.id[:8]}"
    )
    if failures:
        text = "; ".join(failures)
        ctx.store.update(vm.id, state="error", last_error=text, boot_id=None, paused=None)
        raise BangerError("operation_failed", text)
    now = ctx.store.find(vm.id)
    if now is not None and now.state == "running":
        # Also where it was said before: then a machine had ended, and nobody watches any more.
        before = "stopped" if vm.state == "running" else vm.state
        ctx.store.update(vm.id, state=before, boot_id=None, paused=None)


async def _ready(
    announced: asyncio.Future[Announcement],
    exited: asyncio.Future[ExitStatus | None],
    plan: StartPlan,
    console_start: int,
) -> Announcement:
    """The agent's announcement against the process's exit, whichever comes first."""
    racers: list[asyncio.Future[Any]] = [announced, exited]
    done, _ = await asyncio.wait(
        racers, timeout=plan.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED
    )
    if exited in done:
        raise _ended(plan, exited.result(), console_start)
    if announced in done:
        return announced.result()
    line = console.last_line(plan.paths.console, start=console_start)
    raise BangerError(
        "operation_failed",
        f"starting VM {plan.vm.name}: no answer from the guest agent within "
        f"{plan.ready_timeout_s:g} s; last console line: {line!r}; the VM still exists",
        hint=f"banger vm logs {plan.vm.name}",
        reason="guest_not_ready",
        outcome="unknown",
    )


def _ended(plan: StartPlan, status: ExitStatus | None, console_start: int) -> BangerError:
    lines = console.tail(plan.paths.console, _CONSOLE_LINES, start=console_start)
    how = f" ({status})" if status is not None else ""
    told = "\n".join(f"    {line}" for line in lines) if lines else "    (the console is empty)"
    line = console.last_line(plan.paths.console, start=console_start)
    return BangerError(
        "operation_failed",
        f"starting VM {plan.vm.name}: the machine ended before its guest was ready{how}: "
        f"{line}\n{told}",
        hint=f"banger vm logs {plan.vm.name}",
    )


def _publish(
    ctx: VmContext,
    vm: VmRecord,
    driver: Driver,
    process: ProcessRef,
    announcement: Announcement | None,
) -> VmRecord:
    record = ctx.store.update(
        vm.id,
        state="running",
        provisional=vm.building,
        vmm=driver.name,
        boot_id=announcement.boot_id if announcement else None,
        paused=None,
        files_synced=vm.files_synced or announcement is not None,
        last_error=None if announcement else "the guest agent did not announce itself in time",
        touched_at=now_text(),
    )
    ctx.watch(vm.id, watch(ctx, vm.id, process))
    ctx.names.publish(record)
    return record


async def watch(ctx: VmContext, vm_id: str, process: ProcessRef) -> None:
    """Wait for the end of a VMM that nobody asked to end, and make the record say so."""
    status = await wait_exit(process)
    async with ctx.locked(vm_id):
        vm = ctx.store.find(vm_id)
        handles = ctx.handles.get(vm_id)
        if vm is None or handles is None or handles.process != process:
            return
        how = f" ({status})" if status is not None else ""
        log.warning("VM %s: the machine ended by itself%s", vm.name, how)
        why = f"the machine ended by itself{how}"
        # First, for those who look while what it held is given back.
        await reset(ctx, ctx.store.update(vm_id, last_error=why), last_error=why)


def _size(plan: StartPlan) -> int:
    try:
        return plan.paths.console.stat().st_size
    except FileNotFoundError:
        return 0


def _free_port() -> int:
    # The port is free now and ours in a moment: QEMU says clearly when somebody was quicker.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class _StageTimer:
    """Reports stages and remembers how long each took, for the log."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._began = self._last = time.monotonic()
        self._stages: list[tuple[str, float]] = []
        self._current: str | None = None

    def stage(self, stage: str, label: str) -> None:
        self._close()
        self._current = stage
        self._report.stage(stage, label)

    def _close(self) -> None:
        now = time.monotonic()
        if self._current is not None:
            self._stages.append((self._current, now - self._last))
        self._last = now

    def log(self, vm: VmRecord) -> None:
        self._close()
        parts = " ".join(f"{name}={seconds * 1000:.0f}ms" for name, seconds in self._stages)
        log.info(
            "VM %s started in %.0f ms: %s", vm.name, (time.monotonic() - self._began) * 1000, parts
        )
