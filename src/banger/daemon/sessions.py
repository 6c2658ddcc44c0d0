"""The calls about sessions: each goes to the guest's agent, which alone knows them.

Logs, attach and send are spoken by the client with the agent itself, over the descriptor that
`vm.connect` gives: their bytes do not pass through the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.api import results as r
from banger.session import sessions
from banger.vm import idle

if TYPE_CHECKING:
    from banger.api import params as p
    from banger.api.records import VmRecord
    from banger.api.sessions import KillSession, Session, SessionRef, StartSession, StopSession
    from banger.daemon.daemon import Daemon
    from banger.guest.client import GuestClient
    from banger.rpc.server import Call


def _guest(daemon: Daemon, ref: str) -> tuple[VmRecord, GuestClient]:
    vm = daemon.store.resolve(ref)
    client = daemon.vms.client(vm)
    return vm, client


async def find_commands(daemon: Daemon, call: Call, params: p.FindCommands) -> r.AgentPlace:
    """Where an agent runs: as asked, else the workspace, else /root/repo if it is there, else home.

    Raises:
        BangerError: not_found, naming every program that the guest lacks.
    """
    vm, client = _guest(daemon, params.vm)
    vm = idle.touch(daemon.vms, vm)
    workspace = vm.workspace.guest_path if vm.workspace else None
    return await daemon.vms.while_running(
        vm,
        sessions.find_place(
            client, vm.name, params.names, cwd=params.cwd, workspace=workspace, user=params.user
        ),
    )


async def start(daemon: Daemon, call: Call, params: StartSession) -> Session:
    vm, client = _guest(daemon, params.vm)
    vm = idle.touch(daemon.vms, vm)
    return await daemon.vms.while_running(vm, sessions.start(client, vm.name, params))


async def list_sessions(daemon: Daemon, call: Call, params: p.VmRef) -> list[Session]:
    vm, client = _guest(daemon, params.vm)
    return await daemon.vms.while_running(vm, sessions.list_sessions(client, vm.name))


async def show(daemon: Daemon, call: Call, params: SessionRef) -> Session:
    vm, client = _guest(daemon, params.vm)
    return await daemon.vms.while_running(vm, sessions.show(client, vm.name, params.session))


async def stop(daemon: Daemon, call: Call, params: StopSession) -> Session:
    vm, client = _guest(daemon, params.vm)
    work = sessions.stop(client, vm.name, params.session, timeout_s=params.timeout_s)
    return await daemon.vms.while_running(vm, work)


async def kill(daemon: Daemon, call: Call, params: KillSession) -> Session:
    vm, client = _guest(daemon, params.vm)
    work = sessions.kill(client, vm.name, params.session, signal=params.signal)
    return await daemon.vms.while_running(vm, work)


async def remove(daemon: Daemon, call: Call, params: SessionRef) -> r.Deleted:
    vm, client = _guest(daemon, params.vm)
    await daemon.vms.while_running(vm, sessions.remove(client, params.session))
    return r.Deleted(name=params.session)
