"""`banger system uninstall`: take everything back that `install` and the services made.

Every step is tried, so that one that fails leaves no more than its own part; all failures are in
the error. The owner's configuration and ssh keys are never touched.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.config.install import InstallRecord, read_install_record
from banger.config.settings import read_settings
from banger.errors import BangerError
from banger.files import remove_tree
from banger.process import run
from banger.rpc import client
from banger.system.helper_line import release_all
from banger.system.installer import count_leases
from banger.system.release import PROGRAMS
from banger.system.systemd import (
    UNITS,
    ask_state,
    forget_units,
    require_systemd,
    stop_services,
    systemctl,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.config.system_paths import SystemPaths

    Say = Callable[[str], None]

_LINKS = Path("/sys/class/net")
_DEADLINE_S = 60.0


def uninstall(system: SystemPaths, *, purge: bool, force: bool, say: Say) -> None:
    """Remove the system installation. `force` stops its VMs first; `purge` removes its data too.

    Raises:
        BangerError: not_found: there is none; in_use: VMs run; else what could not be removed.
    """
    require_systemd(system)
    record = read_install_record(system)
    if record is None and not system.programs.exists() and not (purge and system.state.exists()):
        raise BangerError(
            "not_found",
            f"uninstalling: there is no system installation ({system.record} is missing)",
            hint="sudo banger system install --owner $USER",
        )
    running = count_leases(system)
    if running and not force:
        raise BangerError(
            "operation_failed",
            f"uninstalling: {_name_running(system) or f'{running} VMs'} run; --force stops them",
            hint="banger vm list",
            reason="in_use",
        )
    failures = Failures()
    if running:
        with failures.noted("stopping VMs"):
            _stop_vms(system, say)
    with failures.noted("releasing what VMs hold"):
        _release(system, failures, say)
    with failures.noted("stopping the services"):
        stop_services()
        if any((system.units / unit).exists() for unit in UNITS):
            systemctl("disable", *UNITS)
    with failures.noted("removing links and rules"):
        _remove_network(say)
    if failures.texts and not force:
        raise failures.error("uninstalling (nothing was removed; --force goes on all the same)")
    jails = _jails(system)
    for path in _files(system):
        with failures.noted(f"removing {path}"):
            _remove(path, say)
    with failures.noted("reloading systemd"):
        forget_units()
    if purge:
        # A jail base that the configuration names may hold more than jails.
        for path in (system.state, system.cache, system.runtime, jails / "firecracker",
                     system.helper_state, system.helper_runtime, system.etc):  # fmt: skip
            with failures.noted(f"removing {path}"):
                _remove(path, say)
    _tell_kept(system, record, purge=purge, say=say)
    if failures.texts:
        raise failures.error("uninstalling")


class Failures:
    """What went wrong in steps that do not depend on each other."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextlib.contextmanager
    def noted(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (BangerError, OSError) as e:
            self.texts.append(f"{doing}: {e}")

    def error(self, doing: str) -> BangerError:
        return BangerError(
            "operation_failed",
            f"{doing}: {'; '.join(self.texts)}",
            hint="sudo banger system status",
        )


def _list_running(system: SystemPaths) -> list[VmRecord]:
    socket = system.runtime / "bangerd.sock"
    vms = client.call(socket, "vm.list", p.Empty(), list[VmRecord], state=system.state)
    return [vm for vm in vms if vm.state == "running"]


def _name_running(system: SystemPaths) -> str:
    """The names of the VMs that run, as far as the daemon is there to say them."""
    with contextlib.suppress(BangerError):
        return ", ".join(f"VM {vm.name}" for vm in _list_running(system))
    return ""


def _stop_vms(system: SystemPaths, say: Say) -> None:
    """Ask the daemon to stop them in order; what is left is killed with its lease."""
    socket = system.runtime / "bangerd.sock"
    for vm in _list_running(system):
        client.call(socket, "vm.stop", p.StopVm(vm=vm.id), r.Outcome, state=system.state)
        say(f"VM {vm.name} stopped")


def _release(system: SystemPaths, failures: Failures, say: Say) -> None:
    helper, daemon = UNITS
    if not (system.units / helper).exists():
        return
    # The daemon first: it would take new leases, and its end reverts the resolver's routing.
    if ask_state(daemon) == "active":
        systemctl("stop", daemon)
    if ask_state(helper) != "active":
        systemctl("start", helper)
    released = release_all(system)
    failures.texts += released.failures
    for lease in released.leases:
        say(f"released {lease}")


def _remove_network(say: Say) -> None:
    """Taps in store, bridges without ports, and our tables where nothing of ours is left."""
    for link in sorted(_LINKS.glob("tap-pool-*")):
        run(["ip", "link", "delete", link.name], timeout_s=_DEADLINE_S)
        say(f"removed the link {link.name}")
    for link in sorted(_LINKS.glob("br-fc*")):
        # One with ports belongs to a banger in user mode.
        if (link / "bridge").is_dir() and not any((link / "brif").iterdir()):
            run(["ip", "link", "delete", link.name], timeout_s=_DEADLINE_S)
            say(f"removed the bridge {link.name}")
    if any(_LINKS.glob("tap-fc-*")):
        return
    for family in ("inet", "bridge"):
        done = run(["nft", "delete", "table", family, "banger"], check=False, timeout_s=_DEADLINE_S)
        if done.returncode == 0:
            say(f"removed the nft table {family} banger")


def _jails(system: SystemPaths) -> Path:
    try:
        return Path(read_settings(system.config_file).jailer_chroot_base or system.jails)
    except BangerError:
        return system.jails


def _files(system: SystemPaths) -> list[Path]:
    # A program of that name that is not ours stays.
    links = [
        system.bin / name for name in PROGRAMS if _leads_into(system.bin / name, system.current)
    ]
    ours = (system.current, system.previous, system.versions, system.programs / ".lock")
    return [*(system.units / unit for unit in UNITS), *links, *ours, system.record]


def _leads_into(link: Path, directory: Path) -> bool:
    if not link.is_symlink():
        return False
    # By its text: what it leads to may be gone.
    target = Path(os.path.normpath(link.parent / link.readlink()))
    return directory in target.parents


def _remove(path: Path, say: Say) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        remove_tree(path)
    else:
        return
    say(f"removed {path}")
    if path.parent.name == "banger" and path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _tell_kept(system: SystemPaths, record: InstallRecord | None, *, purge: bool, say: Say) -> None:
    places = [] if purge else [system.state, system.cache, system.etc, system.helper_state]
    if record is not None:
        places += [
            Path(record.home) / ".config/banger",
            Path(record.home) / ".local/state/banger/ssh",
        ]
    for place in places:
        if place.exists():
            say(f"kept {place}")
