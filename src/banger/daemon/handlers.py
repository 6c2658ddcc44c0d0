"""The method table: what each call of the contract does, composed from services.

A handler decodes nothing and draws nothing: it gets typed parameters and returns a typed result.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from banger import __version__
from banger.api import catalog as c
from banger.api import operations as o
from banger.api import params as p
from banger.api import results as r
from banger.api import sessions as s
from banger.api import workspaces as w
from banger.daemon import (
    bootstrap,
    catalog,
    container_images,
    given,
    operations,
    runs,
    sessions,
    stored,
    workspaces,
)
from banger.daemon.doctor import doctor
from banger.errors import BangerError
from banger.rpc.server import Method
from banger.vm import idle, observe, space
from banger.vm.change import change
from banger.vm.cleanup import as_it_is, is_live
from banger.vm.create import check_create, create
from banger.vm.ports import ports, reached
from banger.vm.start import start
from banger.vm.stop import check_signal, delete, kill, stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from banger.api.records import VmRecord
    from banger.daemon.daemon import Daemon
    from banger.guest.client import Health
    from banger.rpc.server import Call

_SSH_PORT = 22


def build_methods(daemon: Daemon) -> dict[str, Method]:
    """Name → parameters, handler, streaming (spec 3.7). A contract test pins it."""

    def method(
        params: type,
        handler: Callable[..., Awaitable[Any]],
        *,
        streams: bool = False,
        finishes: bool = False,
    ) -> Method:
        async def bound(call: Call, decoded: Any) -> Any:
            await daemon.sweeps.check_clocks()
            return await handler(daemon, call, decoded)

        return Method(params=params, handler=bound, streams=streams, finishes=finishes)

    return {
        "ping": method(p.Empty, _ping),
        "shutdown": method(p.Empty, _shutdown),
        "daemon.status": method(p.Empty, _status),
        "daemon.doctor": method(p.Doctor, doctor),
        "daemon.operations.list": method(p.Empty, operations.list_operations),
        "daemon.operations.show": method(o.OperationRef, operations.show, streams=True),
        "daemon.operations.cancel": method(o.OperationRef, operations.cancel),
        "vm.run": method(p.RunVm, runs.run, streams=True),
        "vm.create": method(p.CreateVm, _create, streams=True),
        "vm.start": method(p.StartVm, _start, streams=True),
        "vm.stop": method(p.StopVm, _stop, finishes=True),
        "vm.restart": method(p.StartVm, _restart, streams=True),
        "vm.kill": method(p.KillVm, _kill, finishes=True),
        "vm.delete": method(p.VmRef, _delete, finishes=True),
        "vm.set": method(p.SetVm, _set),
        "vm.touch": method(p.VmRef, _touch),
        "vm.list": method(p.Empty, _list),
        "vm.show": method(p.VmRef, _show),
        "vm.stats": method(p.VmRef, _stats),
        "vm.health": method(p.VmRef, _health),
        "vm.ping": method(p.VmRef, _vm_ping),
        "vm.ports": method(p.VmRef, _ports),
        "vm.logs": method(p.VmLogs, _logs, streams=True),
        "vm.connect": method(p.ConnectVm, _connect),
        "vm.ssh": method(p.VmRef, _ssh),
        "vm.workspace.files": method(p.ShipWorkspace, runs.list_files, streams=True),
        "vm.workspace.prepare": method(w.PrepareWorkspace, workspaces.prepare, streams=True),
        "vm.workspace.export": method(w.ExportWorkspace, workspaces.export, streams=True),
        "vm.workspace.changes": method(w.WorkspaceRef, workspaces.changes, streams=True),
        "vm.workspace.applied": method(w.AppliedWorkspace, workspaces.applied),
        "vm.acp.prepare": method(p.FindCommands, sessions.find_commands),
        "vm.session.start": method(s.StartSession, sessions.start),
        "vm.session.list": method(p.VmRef, sessions.list_sessions),
        "vm.session.show": method(s.SessionRef, sessions.show),
        "vm.session.stop": method(s.StopSession, sessions.stop),
        "vm.session.kill": method(s.KillSession, sessions.kill),
        "vm.session.remove": method(s.SessionRef, sessions.remove),
        "image.list": method(p.Empty, stored.image_list),
        "image.show": method(p.NameRef, stored.image_show),
        "image.build": method(p.BuildImage, stored.image_build, streams=True),
        "image.pull": method(p.PullImage, catalog.image_pull, streams=True),
        "image.register": method(c.RegisterImage, given.image_register, streams=True),
        "image.promote": method(p.NameRef, given.image_promote, streams=True),
        "image.export": method(p.NameRef, given.image_export, streams=True),
        "image.cache.prune": method(p.PruneCache, container_images.cache_prune),
        "image.delete": method(p.NameRef, stored.image_delete),
        "image.verify": method(p.NameRef, stored.image_verify),
        "kernel.list": method(p.Empty, stored.kernel_list),
        "kernel.show": method(p.NameRef, stored.kernel_show),
        "kernel.pull": method(p.PullKernel, catalog.kernel_pull, streams=True),
        "kernel.delete": method(p.NameRef, stored.kernel_delete),
        "kernel.build": method(c.BuildKernel, given.kernel_build, streams=True),
        "kernel.import": method(c.ImportKernel, given.kernel_import, streams=True),
        "kernel.export": method(p.NameRef, given.kernel_export, streams=True),
        "kernel.catalog": method(p.Empty, catalog.kernel_catalog),
    }


async def _ping(daemon: Daemon, call: Call, _: p.Empty) -> r.Pong:
    return r.Pong(version=__version__, pid=os.getpid())


async def _shutdown(daemon: Daemon, call: Call, _: p.Empty) -> None:
    assert daemon.server is not None
    others = daemon.server.active - 1
    if others > 0 or daemon.vms.busy > 0:
        raise BangerError(
            "operation_failed",
            f"the daemon has {max(others, daemon.vms.busy)} operations under way",
            hint="banger daemon operations",
            reason="in_use",
        )
    # After the answer, so that the client knows it was heard.
    await call.finish(r.Pong(version=__version__, pid=os.getpid()))
    daemon.stopping.set()


async def _status(daemon: Daemon, call: Call, _: p.Empty) -> r.DaemonStatus:
    rss = _resident_bytes()
    privilege = daemon.host.privilege
    return r.DaemonStatus(
        version=__version__,
        pid=os.getpid(),
        mode=daemon.paths.mode,
        socket=str(daemon.paths.daemon_socket),
        log=_log_of(daemon),
        uptime_s=round(time.monotonic() - daemon.started, 1),
        rss_bytes=rss,
        threads=threading.active_count(),
        tasks=len(asyncio.all_tasks()),
        vms_running=sum(is_live(daemon.vms, vm) for vm in daemon.store.list()),
        network=daemon.network,
        network_note=privilege.missing or None,
        dns=daemon.names.listen,
        dns_note=daemon.names.problem or daemon.names.routing_problem,
        vmm=await daemon.vmm_verdict(),
    )


def _log_of(daemon: Daemon) -> str:
    if daemon.paths.mode == "system":
        return "the journal: journalctl -u bangerd"
    return str(daemon.paths.daemon_log)


def _resident_bytes() -> int:
    # proc_pid_statm(5), second field: resident pages.
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _create(daemon: Daemon, call: Call, params: p.CreateVm) -> VmRecord | o.Detached:
    check_create(params)
    work = _create_now(daemon, call, params)
    if not params.detach:
        return await work
    assert daemon.server is not None
    return daemon.server.detach(call, work)


async def _create_now(daemon: Daemon, call: Call, params: p.CreateVm) -> VmRecord:
    image = await stored.ensure_image(daemon, params.image, call)
    vm = await create(daemon.vms, params, image, call)
    call.operation.target = vm.name
    return vm


async def _start(daemon: Daemon, call: Call, params: p.StartVm) -> r.Outcome:
    vm = daemon.store.resolve(params.vm)
    if is_live(daemon.vms, vm):
        return r.Outcome(vm=vm, note=f"VM {vm.name} is running already")
    async with daemon.vms.locked(vm.id):
        vm = daemon.store.resolve(vm.id)
        vm = await start(daemon.vms, vm, call, allow_overcommit=params.allow_overcommit)
    return r.Outcome(vm=vm)


async def _stop(daemon: Daemon, call: Call, params: p.StopVm) -> r.Outcome:
    vm = daemon.store.resolve(params.vm)
    vm, note = await daemon.vms.finish_alone(
        stop(daemon.vms, vm, timeout_s=params.timeout_s), f"stop {vm.name}"
    )
    return r.Outcome(vm=_ended(vm), note=note)


def _ended(vm: VmRecord) -> VmRecord:
    """Raises BangerError for a VM that could not be brought to an end (spec 4.1, `error`)."""
    if vm.state == "error":
        raise BangerError(
            "operation_failed",
            f"VM {vm.name}: what it held could not be given back: {vm.last_error}",
            hint=f"banger vm kill {vm.name}",
        )
    return vm


async def _restart(daemon: Daemon, call: Call, params: p.StartVm) -> r.Outcome:
    vm = daemon.store.resolve(params.vm)
    ran = is_live(daemon.vms, vm)
    call.stage("stop", "stopping")
    try:
        vm, note = await daemon.vms.finish_alone(stop(daemon.vms, vm), f"stop {vm.name}")
        _ended(vm)
        try:
            outcome = await _start(
                daemon, call, p.StartVm(vm=vm.id, allow_overcommit=params.allow_overcommit)
            )
        except BangerError as e:
            if ran and e.reason != "guest_not_ready":
                # The start was rolled back; the stop happened all the same.
                e.also.append(f"VM {vm.name} was stopped and does not run")
                e.outcome = "unknown"
            raise
    except asyncio.CancelledError as e:
        if not ran:
            raise
        raise BangerError(
            "operation_failed",
            f"restarting VM {vm.name}: cancelled; VM {vm.name} was stopped, as had been begun, and "
            "not started again",
            hint=f"banger vm start {vm.name}",
            reason="cancelled",
            outcome="unknown",
        ) from e
    return r.Outcome(vm=outcome.vm, note=note or outcome.note)


async def _kill(daemon: Daemon, call: Call, params: p.KillVm) -> r.Outcome:
    check_signal(params.signal)
    vm = daemon.store.resolve(params.vm)
    vm, note = await daemon.vms.finish_alone(kill(daemon.vms, vm, params.signal), f"kill {vm.name}")
    return r.Outcome(vm=_ended(vm), note=note)


async def _delete(daemon: Daemon, call: Call, params: p.VmRef) -> r.Deleted:
    vm = daemon.store.resolve(params.vm)
    # Nothing of a `--rm` machine is wanted any more, so its guest is not asked to stop in order.
    note = await daemon.vms.finish_alone(
        delete(daemon.vms, vm, kill_it=vm.ephemeral), f"delete {vm.name}"
    )
    return r.Deleted(name=vm.name, note=note)


async def _set(daemon: Daemon, call: Call, params: p.SetVm) -> r.SetResult:
    vm, later = await change(daemon.vms, daemon.store.resolve(params.vm), params)
    return r.SetResult(vm=vm, at_next_start=later)


async def _touch(daemon: Daemon, call: Call, params: p.VmRef) -> VmRecord:
    return idle.touch(daemon.vms, daemon.store.resolve(params.vm))


async def _list(daemon: Daemon, call: Call, _: p.Empty) -> list[VmRecord]:
    return [space.marked(daemon.vms, as_it_is(daemon.vms, vm)) for vm in daemon.store.list()]


async def _show(daemon: Daemon, call: Call, params: p.VmRef) -> VmRecord:
    vm = await bootstrap.settle(daemon, daemon.store.resolve(params.vm))
    return space.marked(daemon.vms, as_it_is(daemon.vms, vm))


async def _stats(daemon: Daemon, call: Call, params: p.VmRef) -> r.VmStats:
    return await observe.stats(daemon.vms, daemon.store.resolve(params.vm))


async def _health(daemon: Daemon, call: Call, params: p.VmRef) -> Health:
    return await daemon.vms.client(daemon.store.resolve(params.vm)).health()


async def _vm_ping(daemon: Daemon, call: Call, params: p.VmRef) -> r.Ping:
    vm = daemon.store.resolve(params.vm)
    client = daemon.vms.client(vm)
    began = time.perf_counter()
    await client.call("hello", {}, dict[str, Any])
    return r.Ping(vm=vm.name, round_trip_ms=round((time.perf_counter() - began) * 1000, 2))


async def _ports(daemon: Daemon, call: Call, params: p.VmRef) -> list[r.PortRow]:
    return await ports(daemon.vms, daemon.store.resolve(params.vm))


async def _logs(daemon: Daemon, call: Call, params: p.VmLogs) -> None:
    vm = daemon.store.resolve(params.vm)
    async for chunk in observe.logs(daemon.vms, vm, tail=params.tail, follow=params.follow):
        await call.data(chunk)


async def _connect(daemon: Daemon, call: Call, params: p.ConnectVm) -> None:
    vm = daemon.store.resolve(params.vm)
    stale = await workspaces.find_stale(vm) if params.check_workspace else None
    await runs.answer_with_agent(
        daemon, call, vm, lambda access: msgspec.structs.replace(access, stale=stale)
    )


async def _ssh(daemon: Daemon, call: Call, params: p.VmRef) -> r.SshAccess:
    vm = daemon.store.resolve(params.vm)
    listeners = await daemon.vms.client(vm).ports()
    found = [x for x in listeners if x.proto == "tcp" and x.port == _SSH_PORT]
    vm = idle.touch(daemon.vms, vm)
    return r.SshAccess(
        vm=vm,
        sshd=bool(found),
        address=vm.address if any(reached(vm, x) for x in found) else "",
        port=_SSH_PORT,
        key=str(daemon.ssh_key),
        known_hosts=str(daemon.paths.known_hosts),
    )
