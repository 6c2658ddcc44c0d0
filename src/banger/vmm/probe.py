"""What this host can run, and which driver that makes.

`probe` tries and asks, `judge` and `choose_driver` decide and are pure. The verdict is a value; who
keeps it, and for how long, is the daemon's business.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from banger.api.records import VmmName
from banger.errors import BangerError
from banger.vmm.firecracker import FirecrackerDriver
from banger.vmm.kvm_probe import (
    DEADLINE_S,
    KvmResult,
    Problem,
    describe_kvm,
    explain_kvm,
    measure_tsc,
    probe_kvm,
)
from banger.vmm.programs import Program, find_firecracker, find_qemu
from banger.vmm.qemu import Accel, QemuDriver

if TYPE_CHECKING:
    from banger.vmm.driver import Driver


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What this host can run. `driver` is what `auto` takes; None when nothing can run.

    `evidence` holds sentences for `doctor`. `vhost_vsock` and `tsc_khz` matter to QEMU only.
    """

    driver: VmmName | None
    accel: Accel
    kvm_usable: bool
    kvm_kind: str
    evidence: tuple[str, ...]
    problems: tuple[Problem, ...]
    firecracker: Program | None
    qemu: Program | None
    vhost_vsock: bool
    tsc_khz: int | None


def probe(
    *,
    bin_directory: Path,
    firecracker_bin: str | None = None,
    device: Path = Path("/dev/kvm"),
    deadline_s: float = DEADLINE_S,
) -> Verdict:
    """Try and ask everything; about 0.5 s on a healthy host. Blocks: call it in a thread.

    `firecracker_bin` is the setting of that name, `bin_directory` the place of fetched programs.
    What the host lacks is in `problems`, never raised.
    """
    kvm = probe_kvm(device, deadline_s=deadline_s)
    qemu = find_qemu()
    emulated = isinstance(qemu, Program) and not kvm.usable
    return judge(
        kvm=kvm,
        device=device,
        firecracker=find_firecracker(firecracker_bin, bin_directory),
        qemu=qemu,
        vhost_vsock=os.access("/dev/vhost-vsock", os.R_OK | os.W_OK),
        tsc_khz=measure_tsc() if emulated else None,
    )


def judge(
    *,
    kvm: KvmResult,
    firecracker: Program | Problem,
    qemu: Program | Problem,
    vhost_vsock: bool,
    tsc_khz: int | None,
    device: Path = Path("/dev/kvm"),
) -> Verdict:
    """Weigh what was found: firecracker where KVM works, else qemu, else nothing."""
    found = [p for p in (explain_kvm(kvm, device), firecracker, qemu) if isinstance(p, Problem)]
    driver: VmmName | None = None
    if kvm.usable and isinstance(firecracker, Program):
        driver = "firecracker"
    elif isinstance(qemu, Program):
        driver = "qemu"
    evidence = list(describe_kvm(kvm, device))
    evidence += [
        f"{name} {p.version} at {p.path}" + (f", {p.remark}" if p.remark else "")
        for name, p in (("firecracker", firecracker), ("qemu", qemu))
        if isinstance(p, Program)
    ]
    if driver == "qemu" and not kvm.usable and tsc_khz is None:
        evidence.append("the time stamp counter could not be measured: emulated guests may hang")
    return Verdict(
        driver=driver,
        accel="kvm" if kvm.usable else "tcg",
        kvm_usable=kvm.usable,
        kvm_kind=kvm.kind,
        evidence=tuple(evidence),
        problems=tuple(found),
        firecracker=firecracker if isinstance(firecracker, Program) else None,
        qemu=qemu if isinstance(qemu, Program) else None,
        vhost_vsock=vhost_vsock,
        tsc_khz=tsc_khz,
    )


def choose_driver(
    setting: Literal["auto", "firecracker", "qemu"],
    verdict: Verdict,
    *,
    network: Literal["bridge", "user"] = "bridge",
) -> Driver:
    """The driver for a VM, by the `vmm` setting and what this host can run.

    Raises:
        BangerError: unsupported: the wanted driver cannot run here; message and hint say why.
    """
    wanted = verdict.driver if setting == "auto" else setting
    if setting == "auto" and network == "user":
        wanted = "qemu"
    if wanted == "firecracker":
        if network == "user":
            raise _unusable(
                "firecracker needs a tap, and without root or sudo nobody makes one here",
                'vmm = "auto"',
            )
        if not verdict.kvm_usable or verdict.firecracker is None:
            raise _missing(verdict, ("kvm", "firecracker"), "firecracker cannot run here")
        return FirecrackerDriver(
            program=verdict.firecracker.path, version=verdict.firecracker.version
        )
    if verdict.qemu is None:
        about = (
            ("qemu",) if setting == "qemu" or network == "user" else ("kvm", "firecracker", "qemu")
        )
        raise _missing(
            verdict, about, "no VMM can run here" if wanted is None else "qemu is missing"
        )
    return QemuDriver(
        program=verdict.qemu.path,
        version=verdict.qemu.version,
        accel=verdict.accel,
        sandbox=verdict.qemu.sandbox,
        vhost_vsock=verdict.vhost_vsock,
        tsc_khz=verdict.tsc_khz,
    )


def _missing(verdict: Verdict, about: tuple[str, ...], what: str) -> BangerError:
    problems = [p for p in verdict.problems if p.about in about]
    message = ": ".join(filter(None, [what, "; ".join(p.message for p in problems)]))
    hints = [p.hint for p in problems if p.hint]
    # The last problem is the cheapest to mend: a program is installed sooner than a processor.
    return _unusable(message, hints[-1] if hints else "banger doctor")


def _unusable(message: str, hint: str) -> BangerError:
    return BangerError("operation_failed", message, hint=hint, reason="unsupported")
