"""`vm.run`: image, VM, workspace and a connected agent in one call; and the pieces of it.

The connected descriptor goes to the client, so that a command's bytes never pass through the
daemon, and the daemon's end does not end the command.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from banger.api import params as p
from banger.api import results as r
from banger.api.records import OwnerProcess, VmRecord
from banger.daemon import bootstrap, ships, stored
from banger.decoding import convert
from banger.errors import BangerError
from banger.host.vmm_process import ProcessRef, find_process, wait_exit
from banger.rpc import frames
from banger.vm import idle
from banger.vm.cleanup import is_live
from banger.vm.create import check_create, create
from banger.vm.handles import read_secrets
from banger.vm.stop import delete
from banger.vm.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.daemon.daemon import Daemon
    from banger.rpc.server import Call

log = logging.getLogger(__name__)


async def run(daemon: Daemon, call: Call, params: p.RunVm) -> None:
    """Everything of `banger vm run` up to the moment where the guest command can start."""
    check_create(params.create)
    if params.create.detach:
        raise BangerError(
            "bad_request",
            "vm.run has a connection as its result and cannot be detached",
            hint="banger vm create --detach",
        )
    shipment = tools = None
    if params.workspace is not None:
        call.stage("inspect", "inspecting the repository", params.workspace.path)
        shipment = await ships.inspect(daemon, params.workspace)
        if params.bootstrap:
            tools = await bootstrap.plan(daemon, shipment, nat=params.create.nat)
    image = await stored.ensure_image(daemon, params.create.image, call)
    # In the row from the first moment: no crash leaves a machine that nobody will delete.
    owner = _owner(call.peer_pid) if params.rm else None
    vm = await create(daemon.vms, params.create, image, call, owner=owner)
    call.operation.target = vm.name
    if owner is not None:
        daemon.guard(vm.id, process_of(owner))
    async with Undo() as undo:
        # Until its client has the connection: who leaves earlier is told that nothing is left.
        undo.push(f"VM {vm.name}", lambda: _discard(daemon, vm))
        try:
            workspace, files, size = None, 0, 0
            if shipment is not None:
                call.stage("workspace", "copying the repository", shipment.guest_path)
                workspace, files, size = await ships.ship(daemon, vm, shipment, call)
                vm = daemon.store.update(vm.id, workspace=workspace)
                if tools is not None:
                    vm = await bootstrap.begin(daemon, vm, shipment, tools, call)

            def answer(access: r.AgentAccess) -> r.RunResult:
                return r.RunResult(
                    vm=access.vm,
                    access=access,
                    workspace=workspace,
                    files=files,
                    bytes=size,
                    image_config=image.oci,
                )

            await answer_with_agent(daemon, call, vm, answer, subdirectory=_below(shipment))
        except BangerError as e:
            if not params.rm:
                undo.keep()
                now = daemon.store.find(vm.id)
                if now is not None:
                    what = "still runs" if is_live(daemon.vms, now) else "does not run any more"
                    e.also.append(f"VM {vm.name} was created and {what}")
                    e.outcome = "unknown"
            raise
        undo.keep()


def _below(shipment: ships.Shipment | None) -> str | None:
    return shipment.working_directory if shipment is not None else None


def _owner(pid: int) -> OwnerProcess:
    """The command that an ephemeral VM belongs to, however that command ends."""
    process = find_process(pid)
    if process is None:
        raise BangerError("operation_failed", "the command that asked for the VM is gone")
    return convert(process, OwnerProcess, from_attributes=True)


def process_of(owner: OwnerProcess) -> ProcessRef:
    return convert(owner, ProcessRef, from_attributes=True)


async def delete_with_owner(daemon: Daemon, vm_id: str, owner: ProcessRef) -> None:
    """Wait for the owner's end, then delete its VM unless the owner did that itself."""
    await wait_exit(owner)
    vm = daemon.store.find(vm_id)
    if vm is None:
        return
    try:
        await daemon.vms.finish_alone(_discard(daemon, vm), f"delete {vm.name}")
    except BangerError as e:
        # It stays, in state error, until somebody deletes it or a daemon starts.
        log.warning("VM %s, whose command has ended: %s", vm.name, e)


async def _discard(daemon: Daemon, vm: VmRecord) -> None:
    """Delete a VM that nobody wants any more, and perhaps somebody deletes already."""
    try:
        await delete(daemon.vms, vm, kill_it=True)
    except BangerError as e:
        if e.code != "not_found":
            raise


async def answer_with_agent(
    daemon: Daemon,
    call: Call,
    vm: VmRecord,
    build: Callable[[r.AgentAccess], Any],
    *,
    subdirectory: str | None = None,
) -> None:
    """Connect to the VM's agent and answer the call with the descriptor."""
    client = daemon.vms.client(vm)
    process = daemon.vms.handles[vm.id].process
    assert process is not None
    vm = idle.touch(daemon.vms, vm)
    sock = await client.open()
    try:
        access = r.AgentAccess(
            vm=vm,
            token=read_secrets(daemon.vms.vm_paths(vm.id)).token,
            cwd=subdirectory or (vm.workspace.guest_path if vm.workspace else None),
            login=True,
            vmm_pid=process.pid,
            vmm_start_time=process.start_time,
        )
        # The client reads it with blocking calls; the flag belongs to the shared description.
        os.set_blocking(sock.fileno(), True)
        await call.finish(build(access), fds=(sock.fileno(),))
    finally:
        sock.close()


async def list_files(daemon: Daemon, call: Call, params: p.ShipWorkspace) -> r.FileList:
    """What `--dry-run` prints: exactly the files that would be shipped, as data, a line each."""
    shipment = await ships.inspect(daemon, params)
    lines: list[bytes] = []
    size = 0
    for name in await ships.names(daemon, shipment):
        line = f"{name}\n".encode()
        if size + len(line) > frames.PAYLOAD_LIMIT:
            await call.data(b"".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        await call.data(b"".join(lines))
    return r.FileList(names=())
