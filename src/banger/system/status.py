"""`banger system status`: both services, and what they say of themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.config.install import InstallRecord, read_install_record
from banger.errors import BangerError
from banger.rpc import client
from banger.system.helper_line import ask_helper
from banger.system.installer import count_vms
from banger.system.systemd import UNITS, ask_state, require_systemd

if TYPE_CHECKING:
    from banger.config.system_paths import SystemPaths

_PATIENCE_S = 10.0


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """One service. `state` is systemd's word; `problem` says why it does not answer us."""

    unit: str
    state: str
    socket: str
    version: str | None = None
    problem: str | None = None

    @property
    def ready(self) -> bool:
        return self.state == "active" and self.problem is None


class SystemStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole installation; `vms` counts records, `vms_running` is None without the daemon."""

    record: InstallRecord
    release: str
    helper: Service
    daemon: Service
    dns: str | None
    vms: int | None
    vms_running: int | None
    ready: bool


def read_status(system: SystemPaths) -> SystemStatus:
    """Ask systemd and both services, as whoever we are.

    Raises:
        BangerError: not_found: there is no system installation.
    """
    record = read_install_record(system)
    if record is None:
        raise BangerError(
            "not_found",
            f"there is no system installation here ({system.record} is missing)",
            hint="sudo banger system install --owner $USER",
        )
    require_systemd(system)
    helper = _helper(system)
    daemon, said = _daemon(system)
    try:
        vms: int | None = count_vms(system)
    except PermissionError:
        vms = None
    return SystemStatus(
        record=record,
        release=system.current.resolve().name,
        helper=helper,
        daemon=daemon,
        dns=said.dns if said else None,
        vms=vms,
        vms_running=said.vms_running if said else None,
        ready=helper.ready and daemon.ready,
    )


def _helper(system: SystemPaths) -> Service:
    service = Service(unit=UNITS[0], state=ask_state(UNITS[0]), socket=str(system.helper_socket))
    try:
        said = ask_helper(system)
    except BangerError as e:
        return msgspec.structs.replace(service, problem=str(e))
    return msgspec.structs.replace(service, version=str(said.version))


def _daemon(system: SystemPaths) -> tuple[Service, r.DaemonStatus | None]:
    socket = system.runtime / "bangerd.sock"
    service = Service(unit=UNITS[1], state=ask_state(UNITS[1]), socket=str(socket))
    try:
        said = client.call(
            socket, "daemon.status", p.Empty(), r.DaemonStatus, timeout_s=_PATIENCE_S,
            state=system.state,
        )  # fmt: skip
    except (BangerError, OSError) as e:
        return msgspec.structs.replace(service, problem=str(e)), None
    return msgspec.structs.replace(service, version=said.version), said
