"""The tooling bootstrap: a workspace's pinned tools, installed by mise in a session of the guest.

Planned before a VM exists; begun when the repository lies there; best effort ever after. The
session outlives the call, the client and the daemon: how it ended is asked of the guest when
somebody looks at the VM, and is then in its record.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from banger.api.base import Wire
from banger.api.records import Bootstrap
from banger.api.sessions import StartSession
from banger.daemon import ships
from banger.errors import BangerError
from banger.session import sessions
from banger.vm.cleanup import is_live
from banger.workspace.tool_files import read_tool_files
from banger.workspace.tooling import ToolPlan, describe, plan_tools

if TYPE_CHECKING:
    from banger.api.records import VmRecord
    from banger.api.sessions import Session
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter

SESSION = "tooling"
_MISE = ("mise", "/root/.local/bin/mise")
_LOOK_S = 60.0
_SETTLE_S = 5.0

# Its words are $1 log, $2 repository, $3 number of mise files, $4 the plan, then TOOL@VERSION each.
# The status of what is piped into tee travels beside it, on descriptor 3.
_SCRIPT = """
main() {
    printf '%s' "$4"
    repository=$2 configured=$3
    shift 4
    mise=$(command -v mise) || mise=/root/.local/bin/mise
    cd "$repository" || return
    failed=0
    step() {
        printf '+ mise %s\\n' "$*"
        "$mise" "$@" || { printf 'failed with status %s: mise %s\\n' "$?" "$*"; failed=1; }
    }
    if [ "$configured" != 0 ]; then
        step trust --quiet --all "$repository"
        step install
    fi
    for tool in "$@"; do
        step use -g --pin "$tool"
    done
    return "$failed"
}
mkdir -p "${1%/*}"
exec 4>&1
status=$( { { main "$@" 3>&- 4>&- </dev/null; echo "$?" >&3; } 2>&1 | tee "$1" >&4 3>&-; } 3>&1 )
exit "$status"
"""


class _Missing(Wire, frozen=True, kw_only=True):
    missing: tuple[str, ...]


async def plan(daemon: Daemon, shipment: ships.Shipment, *, nat: bool) -> ToolPlan:
    """What there is to install for a repository.

    Raises:
        BangerError: bad_request: it needs a network that the VM will not have.
    """
    files = await asyncio.to_thread(
        read_tool_files,
        shipment.repository,
        shipment.options,
        scratch_parent=ships.scratch_directory(daemon),
    )
    made = plan_tools(files)
    if made.mise_files and not nat:
        raise BangerError(
            "bad_request",
            f"{shipment.repository.root} has {' and '.join(made.mise_files)}: the tools that it "
            "names are installed over the network, and the VM would have none",
            hint="banger vm run PATH --nat, or --no-bootstrap",
        )
    return made


async def begin(
    daemon: Daemon, vm: VmRecord, shipment: ships.Shipment, made: ToolPlan, report: Reporter
) -> VmRecord:
    """Start it in the background, or say why it does not run; never raises for its own sake."""
    if made.empty:
        return vm
    tools = ", ".join([*made.mise_files, *(step.word for step in made.steps)])
    if not vm.nat:
        report.warn(f"tools are not installed ({tools}): VM {vm.name} has no way out, see --nat")
        return vm
    report.stage("bootstrap", "installing tools", tools)
    client = daemon.vms.client(vm)
    log = f"/root/.cache/banger/vm-run-tooling-{shipment.repository.name}.log"
    asked = {"names": list(_MISE), "login": True}
    params = StartSession(
        vm=vm.name,
        name=SESSION,
        argv=(
            "sh", "-c", _SCRIPT, SESSION, log, shipment.guest_path, str(len(made.mise_files)),
            "".join(f"{line}\n" for line in describe(made)),
            *(step.word for step in made.steps),
        ),
        cwd=shipment.guest_path,
        env={"MISE_YES": "1"},
        tags=("banger",),
    )  # fmt: skip
    try:
        lacking = await daemon.vms.while_running(
            vm, client.call("missing", asked, _Missing, timeout_s=_LOOK_S)
        )
        if set(_MISE) <= set(lacking.missing):
            report.warn(f"tools are not installed ({tools}): VM {vm.name} has no mise")
            return vm
        await daemon.vms.while_running(vm, sessions.start(client, vm.name, params))
    except BangerError as e:
        report.warn(f"tools are not installed ({tools}): {e}")
        return vm
    begun = Bootstrap(state="running", log=log, session=SESSION)
    return daemon.store.update(vm.id, bootstrap=begun)


async def settle(daemon: Daemon, vm: VmRecord) -> VmRecord:
    """The record, with how a bootstrap ended that was running when it was last looked at."""
    begun = vm.bootstrap
    if begun is None or begun.state != "running" or vm.state == "suspended":
        return vm
    if not is_live(daemon.vms, vm):
        return _end(daemon, vm, "the VM was stopped before its end")
    client = daemon.vms.client(vm)
    try:
        async with asyncio.timeout(_SETTLE_S):
            session = await daemon.vms.while_running(
                vm, sessions.show(client, vm.name, begun.session)
            )
    except TimeoutError:
        return vm
    except BangerError as e:
        # A guest that does not answer says nothing of how it went.
        return _end(daemon, vm, "its session is gone") if e.code == "not_found" else vm
    return vm if session.live else _end(daemon, vm, _problem(session))


def _problem(session: Session) -> str | None:
    if session.state == "exited" and session.code == 0:
        return None
    if session.code is not None:
        return f"status {session.code}"
    return session.reason or session.signal or session.state


def _end(daemon: Daemon, vm: VmRecord, problem: str | None) -> VmRecord:
    assert vm.bootstrap is not None
    ended = msgspec.structs.replace(
        vm.bootstrap, state="failed" if problem else "done", problem=problem
    )
    return daemon.store.update(vm.id, bootstrap=ended)
