"""A world for doctor: a made-up host below a directory, programs that say what a test says.

Nothing of the real host is read: not its programs, its files below `/`, its daemon or its helper.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from banger.api.doctor import DoctorFacts, DoctorLease, DoctorRow, HelperFacts
from banger.api.records import VmRecord
from banger.config.paths import Paths
from banger.config.settings import Settings
from banger.config.system_paths import SystemPaths
from banger.doctor.examine import _rows
from banger.doctor.table import CHECKS
from banger.doctor.world import Configuration, DaemonLook, Store, World, settings_hash
from banger.progress import Silent
from banger.store.look import DatabaseLook
from banger.vmm.probe import Verdict
from banger.vmm.programs import Program

_TABLE = {check.name: check for check in CHECKS}


class FakeWorld(World):
    """`programs`: name → what it prints on stdout for which arguments (None: it fails)."""

    def __init__(self, root: Path, *, uid: int | None = None, **facts: Any) -> None:
        paths = Paths(
            state=root / "state" / "banger",
            cache=root / "cache" / "banger",
            runtime=root / "run" / "banger",
            config_file=root / "config" / "banger" / "config.toml",
            system=SystemPaths(root=root / "sys"),
        )
        known = {
            "verdict": verdict(),
            "configuration": Configuration(settings=Settings()),
            "store": database(),
            "daemon": DaemonLook(state="absent"),
            "helper": HelperFacts(privilege="root", version=1),
            "live": frozenset[str](),
            "vm_places": (),
            **facts,
        }
        super().__init__(paths, root=root / "host", known=known)
        self.programs: dict[str, dict[tuple[str, ...], str | None]] = {}
        self._uid = uid
        self.root.mkdir(exist_ok=True)

    @property
    def uid(self) -> int:
        return super().uid if self._uid is None else self._uid

    def have(self, path: str, text: str = "") -> Path:
        """Put a file into the made-up host."""
        file = self.file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def says(self, *argv: str, out: str | None) -> None:
        """A program of this host, and its output; with `out` None it fails."""
        self.programs.setdefault(argv[0], {})[argv[1:]] = out

    def find_program(self, name: str) -> str | None:
        return f"/usr/bin/{name}" if name in self.programs or name.startswith("/") else None

    def run(self, *argv: str) -> subprocess.CompletedProcess[bytes] | None:
        answers = self.programs.get(argv[0])
        if answers is None:
            return None
        out = answers.get(argv[1:])
        if out is None:
            return subprocess.CompletedProcess(list(argv), 1, b"", b"it cannot")
        return subprocess.CompletedProcess(list(argv), 0, out.encode(), b"")

    def set_settings(self, **changes: Any) -> None:
        self.known["configuration"] = Configuration(settings=Settings(**changes))

    def set_vms(self, *vms: VmRecord, live: bool = True) -> None:
        self.known["store"] = database(*vms)
        self.known["live"] = frozenset(vm.id for vm in vms if live)

    def look(self, check: str) -> list[DoctorRow]:
        """The rows of one check."""
        return _rows(_TABLE[check], self)

    def row(self, check: str) -> DoctorRow:
        """The only row of one check."""
        (row,) = self.look(check)
        return row

    def fix(self, check: str) -> list[str]:
        fix = _TABLE[check].fix
        assert fix is not None
        return list(fix(self, Silent()))


def verdict(**changes: Any) -> Verdict:
    """A host where KVM works under firecracker."""
    facts: dict[str, Any] = {
        "driver": "firecracker",
        "accel": "kvm",
        "kvm_usable": True,
        "kvm_kind": "usable",
        "evidence": ("the vCPU computed what it should",),
        "problems": (),
        "firecracker": Program(path=Path("/usr/bin/firecracker"), version="1.12.1"),
        "qemu": Program(path=Path("/usr/bin/qemu-system-x86_64"), version="7.2.0"),
        "vhost_vsock": True,
        "tsc_khz": None,
    }
    return Verdict(**{**facts, **changes})


def database(*vms: VmRecord, **changes: Any) -> Store:
    look: dict[str, Any] = {"version": 1, "known_version": 1, "problems": (), "vms": vms}
    return Store(look=DatabaseLook(**{**look, **changes}))


def vm(name: str = "web", number: int = 2, **changes: Any) -> VmRecord:
    fields: dict[str, Any] = {
        "id": f"{number:032x}",
        "name": name,
        "state": "running",
        "image_id": "0" * 32,
        "image": "debian",
        "kernel": "k",
        "vcpu": 1,
        "memory_mib": 512,
        "overlay_bytes": 1 << 29,
        "work_disk_bytes": 1 << 29,
        "address": f"172.16.0.{number}",
        "mac": "06:00:ac:10:00:02",
        "network": "bridge",
    }
    return VmRecord(**{**fields, **changes})


def lease(of: VmRecord, **changes: Any) -> DoctorLease:
    fields: dict[str, Any] = {
        "id": of.id,
        "vm_id": of.id,
        "tap": f"tap-fc-{of.id[-8:]}",
        "address": of.address,
        "bridge": "br-fc",
        "state": "ready",
    }
    return DoctorLease(**{**fields, **changes})


def running(**changes: Any) -> DaemonLook:
    """A daemon that is up."""
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "pid": 4711,
        "network": "bridge",
        "settings_sha256": settings_hash(Settings()),
        "live": (),
        "busy": (),
        "helper": HelperFacts(privilege="root", version=1),
        "dns": "127.0.0.1:42069",
    }
    from banger import __version__

    fields["version"] = __version__
    return DaemonLook(state="up", facts=DoctorFacts(**{**fields, **changes}))
