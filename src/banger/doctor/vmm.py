"""Checks of the VMM: KVM tried with a vCPU, and the programs that run machines."""

from __future__ import annotations

import grp
import pwd
import re
import stat
from typing import TYPE_CHECKING

from banger.doctor.check import Check, Finding, failed, passed, warned
from banger.doctor.trust import distrust
from banger.errors import BangerError
from banger.files import sha256_file
from banger.vmm.fetch import fetch_firecracker, read_pins
from banger.vmm.probe import choose_driver
from banger.vmm.programs import FIRECRACKER_TESTED, find_jailer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.doctor.world import World
    from banger.progress import Reporter
    from banger.vmm.kvm_probe import Problem

_FIX = "banger doctor --fix"
_TESTED = ".".join(map(str, FIRECRACKER_TESTED))
_QEMU = "sudo apt-get install --no-install-recommends qemu-system-x86"


def _look_vmm(world: World) -> Iterator[Finding]:
    verdict, setting = world.verdict(), world.settings.vmm
    try:
        driver = choose_driver(setting, verdict, network=world.network)
    except BangerError as e:
        yield failed(
            f"no VM can run: {e}", *verdict.evidence, command=_typed(e.hint, "banger daemon status")
        )
        return
    what = f"VMs run under {driver.name} {driver.version} (vmm = {setting})"
    if driver.name == "firecracker":
        yield passed(what, *verdict.evidence)
    elif verdict.kvm_usable:
        yield passed(f"{what}, with KVM", *verdict.evidence)
    else:
        problem = _problem(world, "kvm")
        yield warned(
            f"{what}, emulated and several times slower: KVM is not usable",
            *((problem.message,) if problem else ()),
            *verdict.evidence,
            command=_typed(problem.hint if problem else None, None),
        )


def _look_access(world: World) -> Iterator[Finding]:
    """Who may open the device; whether it then works is the probe's verdict."""
    device = world.file("/dev/kvm")
    try:
        st = device.stat()
    except OSError:
        without = passed if world.verdict().qemu else failed
        yield without("this host has no /dev/kvm: there is nothing to have access to")
        return
    who = _name(st.st_uid, group=False), _name(st.st_gid, group=True)
    mode = f"{who[0]}:{who[1]} {stat.filemode(st.st_mode)}"
    if world.verdict().kvm_kind != "denied":
        yield passed(f"{_name(world.uid, group=False)} may open /dev/kvm", mode)
        return
    problem = _problem(world, "kvm")
    # QEMU runs without it, only slowly.
    report = warned if world.verdict().qemu else failed
    yield report(
        f"{_name(world.uid, group=False)} may not open /dev/kvm, which belongs to the group "
        f"{who[1]}",
        mode,
        "a new membership of a group counts after the next login",
        command=_typed(problem.hint if problem else None, "ls -l /dev/kvm"),
    )


def _look_firecracker(world: World) -> Iterator[Finding]:
    found = world.verdict().firecracker
    if found is not None:
        newer = f" ({found.remark})" if found.remark else ""
        yield passed(f"firecracker {found.version} at {found.path}{newer}")
        return
    problem = _problem(world, "firecracker")
    message = problem.message if problem else "firecracker is not usable"
    report = failed if _needs_firecracker(world) else warned
    details = () if _needs_firecracker(world) else ("it is not needed while qemu serves",)
    if world.settings.firecracker_bin is None and not world.find_program("firecracker"):
        yield report(message, *details, command=_FIX, fixable=True)
        return
    # The configured one, or the one on PATH, comes first: it is the user's to replace.
    yield report(
        message,
        *details,
        f"set firecracker_bin to another one; with none configured and none on PATH, --fix fetches "
        f"the pinned {_TESTED}",
        command=f"$EDITOR {world.paths.config_file}",
    )


def _look_jailer(world: World) -> Iterator[Finding]:
    if world.paths.mode == "user":
        yield passed("in user mode VMs run without a jailer; it belongs to the system installation")
        return
    firecracker = world.verdict().firecracker
    if firecracker is None:
        yield passed("without firecracker there is nothing to jail")
        return
    if not world.settings.jailer_enabled:
        yield warned(
            "jailer_enabled is false: VMs run outside a jail, which is for debugging",
            command=f"$EDITOR {world.paths.config_file}",
        )
        return
    try:
        path = find_jailer(world.settings.jailer_bin, firecracker.path, world.paths.bin)
    except BangerError as e:
        yield failed(str(e), command=_FIX, fixable=world.settings.jailer_bin is None)
        return
    said = world.ask(str(path), "--version") or ""
    version = re.search(r"v(\d+\.\d+\.\d+)", said)
    if version is None or version[1] != firecracker.version:
        have = version[1] if version else "no version"
        yield failed(
            f"{path} is {have}, firecracker is {firecracker.version}: both come from one release",
            command=_FIX,
            fixable=world.settings.jailer_bin is None,
        )
        return
    for program in (firecracker.path, path):
        why = distrust(program)
        if why is not None and not _is_pinned(program):
            yield failed(
                f"root would not run {program}: {why}, and it is not the pinned build",
                command="sudo banger system install --owner $USER",
            )
            return
    yield passed(f"jailer {version[1]} at {path}")


def _look_qemu(world: World) -> Iterator[Finding]:
    found = world.verdict().qemu
    needed = world.settings.vmm == "qemu" or not (
        world.verdict().kvm_usable and world.network == "bridge"
    )
    if found is not None:
        vsock = "/dev/vhost-vsock is " + ("usable" if world.verdict().vhost_vsock else "not usable")
        sandbox = "with seccomp filters" if found.sandbox else "built without seccomp filters"
        yield passed(f"qemu {found.version} at {found.path}, {sandbox}", vsock)
        return
    problem = _problem(world, "qemu")
    message = problem.message if problem else "qemu is not usable"
    if needed:
        yield failed(message, command=_typed(problem.hint if problem else None, _QEMU))
    else:
        yield passed(f"{message}, and not needed: firecracker serves")


def _fix_firecracker(world: World, report: Reporter) -> Iterator[str]:
    report.stage("fetch", f"fetching firecracker {_TESTED}")
    # Never into the release's own directory, which is root's.
    paths = fetch_firecracker(world.paths.state / "bin")
    yield f"fetched {' and '.join(p.name for p in paths)} {_TESTED} into {paths[0].parent}"


def _needs_firecracker(world: World) -> bool:
    setting = world.settings.vmm
    return setting == "firecracker" or (setting == "auto" and world.verdict().qemu is None)


def _is_pinned(program: Path) -> bool:
    return sha256_file(program) in read_pins().values()


def _problem(world: World, about: str) -> Problem | None:
    return next((p for p in world.verdict().problems if p.about == about), None)


def _typed(hint: str | None, otherwise: str | None) -> str | None:
    """A hint as it can be typed: without the remark that may follow it, and not doctor again."""
    return hint.partition("   (")[0] if hint and hint != "banger doctor" else otherwise


def _name(number: int, *, group: bool) -> str:
    try:
        return grp.getgrgid(number).gr_name if group else pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


CHECKS = (
    Check(
        name="vmm",
        look=_look_vmm,
        meaning="which VMM serves, by a vCPU that was run through `/dev/kvm` to a known exit; "
        "WARN where VMs are emulated, FAIL where none can run",
        mends="what the row names: a kernel module, a group, a package, or the `vmm` setting",
    ),
    Check(
        name="kvm access",
        look=_look_access,
        meaning="whether you may open `/dev/kvm`, and which group may",
        mends="`sudo usermod -aG kvm $USER`, then a new login",
    ),
    Check(
        name="firecracker",
        look=_look_firecracker,
        fix=_fix_firecracker,
        meaning="present and 1.10.0 or newer; FAIL only where nothing else can run VMs; newer than "
        "the newest tested version is said",
        mends="`--fix` fetches the pinned build from the configured package index; one of yours "
        "is never replaced",
    ),
    Check(
        name="jailer",
        look=_look_jailer,
        fix=_fix_firecracker,
        meaning="in system mode: of firecracker's own version, and a file that root may trust",
        mends="`--fix`, or installing again",
    ),
    Check(
        name="qemu",
        look=_look_qemu,
        meaning="its version and filters; FAIL only where VMs need it",
        mends="the package of your distribution",
    ),
)
