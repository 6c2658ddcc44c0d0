"""Checks of what VMs hold on the host: the root helper, its leases, and what crashes left over."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from banger.api.doctor import DoctorFacts, Undecided
from banger.api.params import Doctor
from banger.doctor.check import Check, Finding, count, failed, passed, warned
from banger.errors import BangerError
from banger.files import is_abandoned, remove_tree
from banger.names import short_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.doctor.world import World
    from banger.progress import Reporter

_FIX = "banger doctor --fix"
_VM_ID = re.compile(r"[0-9a-f]{32}")
_DELETED = re.compile(r"\.delete-[0-9a-f]{32}")
_SHORT_ID = re.compile(r"[0-9a-f]{12}")
_STAGING = re.compile(r"\..+-[0-9a-f]{8}")


def _look_helper(world: World) -> Iterator[Finding]:
    helper = world.helper()
    if helper.problem is None:
        how = {"root": "as root", "sudo": "through sudo", "service": "as a service"}
        yield passed(
            f"the root helper answers ({how.get(helper.privilege, helper.privilege)}, protocol "
            f"{helper.version})"
        )
        for problem in helper.ledger_problems:
            yield failed(
                f"the ledger is damaged: {problem}", command=f"sudo ls -l {world.paths.leases}"
            )
    elif world.paths.mode == "system":
        yield failed(
            f"the root helper does not answer: {helper.problem}",
            command=helper.hint or "sudo systemctl restart bangerd-root",
        )
    elif helper.privilege == "none":
        yield warned(
            f"no root helper: VMs get QEMU's own network, without an address on this host "
            f"({helper.problem})",
            command=helper.hint,
        )
    else:
        yield failed(
            f"the root helper does not answer: {helper.problem}",
            command=helper.hint or f"cat {world.paths.state / 'banger-root.log'}",
        )


def _look_leases(world: World) -> Iterator[Finding]:
    helper = world.helper()
    if helper.problem is not None:
        yield passed("the root helper does not answer: its leases were not compared")
        return
    if not world.rows_are_known:
        yield passed("the database cannot be read: leases were not compared with it")
        return
    rows, live = {vm.id: vm for vm in world.vms}, world.live()
    facts = world.daemon().facts
    busy = live | set(facts.busy if facts is not None else ())
    unused = []
    for lease in helper.leases:
        if lease.vm_id in busy:
            continue
        vm = rows.get(lease.vm_id)
        whose = f"no VM ({short_id(lease.vm_id)})"
        if vm is not None:
            # A row that says "running" is corrected by the next daemon.
            whose = f"VM {vm.name}, " + (
                "whose machine has ended" if vm.state == "running" else f"which is {vm.state}"
            )
        unused.append(f"{lease.tap} {lease.address}, {lease.state}: {whose}")
    if unused:
        yield warned(
            f"{count(len(unused), 'lease')} held by no running VM",
            *unused,
            command=_FIX,
            fixable=True,
        )
    leased = {lease.vm_id for lease in helper.leases}
    without = [
        rows[i].name for i in sorted(live - leased) if i in rows and rows[i].network == "bridge"
    ]
    if without:
        yield failed(
            f"{', '.join(without)} {'runs' if len(without) == 1 else 'run'} without a lease: the "
            "network of such a VM does not work",
            command=f"banger vm restart {' '.join(without)}",
        )
    if not unused and not without:
        yield passed(f"{count(len(helper.leases), 'lease')}, each of a running VM")


def _look_leftovers(world: World) -> Iterator[Finding]:
    if not world.rows_are_known:
        yield passed("the database cannot be read: nothing can be said to belong to no VM")
        return
    undecided = _undecided(world)
    for it in undecided:
        row = failed if it.level == "FAIL" else warned
        yield row(it.what, command=it.command, fixable=it.command == _FIX)
    told = " ".join(it.what for it in undecided)
    found = [what for path, what in _strangers(world) if str(path) not in told]
    if found:
        yield warned(
            f"{count(len(found), 'thing')} of VMs that are gone or do not run",
            *found,
            command=_FIX,
            fixable=True,
        )
    orphans = [o for o in _orphan_processes(world) if f"(pid {o[0]})" not in told]
    for pid, program in orphans:
        yield failed(
            f"{program} (pid {pid}) runs for no VM of this installation", command=f"kill {pid}"
        )
    staging = [path for path in _staging_directories(world) if _is_left(path)]
    if staging:
        yield warned(
            f"{count(len(staging), 'directory', 'directories')} of interrupted builds and pulls",
            *map(str, staging),
            command=_FIX,
            fixable=True,
        )
    if not found and not orphans and not staging and not undecided:
        yield passed("nothing is left over of VMs, builds or pulls")


def _undecided(world: World) -> tuple[Undecided, ...]:
    """What the daemon found when it compared everything, and left to its user."""
    facts = world.daemon().facts
    return facts.undecided if facts is not None else ()


def _strangers(world: World) -> Iterator[tuple[Path, str]]:
    """Directories and sockets of no VM, as they were before the rows were read."""
    rows = {vm.id for vm in world.vms}
    short = {vm_id[:12] for vm_id in rows}
    stopped = {vm_id[:12] for vm_id in rows - world.live()} - _busy(world)
    for path in world.vm_places():
        if not path.exists():
            continue
        if _VM_ID.fullmatch(path.name) and path.name not in rows:
            yield path, f"VM directory {path} without a VM"
        elif _DELETED.fullmatch(path.name):
            yield path, f"what is left of a deleted VM in {path}"
        elif _SHORT_ID.fullmatch(path.name) and path.name not in short:
            yield path, f"sockets in {path} without a VM"
        elif path.name in stopped and any(_entries(path)):
            yield path, f"sockets in {path} of a VM that does not run"


def _busy(world: World) -> set[str]:
    facts = world.daemon().facts
    return {vm_id[:12] for vm_id in (facts.busy if facts is not None else ())}


def _orphan_processes(world: World) -> Iterator[tuple[int, str]]:
    """VMMs that were started for a VM of this installation, which is not there."""
    known = {vm.id[:12] for vm in world.vms} | _busy(world)
    for process in _entries(world.file("/proc")):
        if not process.name.isdigit():
            continue
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            program = Path(words[0].decode(errors="replace")).name
            if not _is_vmm(program):
                continue
            whose = _whose(world, process, words)
        except OSError:  # somebody else's, or it has ended
            continue
        if whose is not None and whose not in known:
            yield int(process.name), program


def _whose(world: World, process: Path, words: list[bytes]) -> str | None:
    """The short id of the VM of a VMM process; None where it is not ours to know."""
    if world.paths.mode == "system" and process.stat().st_uid == world.uid:
        # Jailed: where it works cannot be read, but the jailer passes on the VM's id.
        after = dict(itertools.pairwise(words)).get(b"--id", b"").decode(errors="replace")
        if _VM_ID.fullmatch(after):
            return after[:12]
    where = (process / "cwd").readlink()
    return where.name if where.parent == world.paths.runtime / "vms" else None


def _is_vmm(program: str) -> bool:
    return program.startswith(("firecracker", "qemu-system"))


def _staging_directories(world: World) -> Iterator[Path]:
    """What builds and pulls make and remove themselves, unless they are killed.

    Only places whose makers hold a lock there, so that an abandoned one can be told.
    """
    paths = world.paths
    places = [paths.images, paths.kernels, paths.state, paths.oci_blobs.parent]
    places.append(paths.cache / "scratch")
    # <build cache>/<kind>/<name>/.build-…
    places += [name for kind in _entries(paths.build_cache) for name in _entries(kind)]
    for place in places:
        for path in _entries(place):
            if _STAGING.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path


def _is_left(path: Path) -> bool:
    try:
        return is_abandoned(path) and not _is_in_use(path.parent)
    except OSError:  # not ours, or just gone
        return False


def _is_in_use(directory: Path) -> bool:
    """Whether anybody works in `directory`: then one of its lock files is held."""
    held = [_take(path) for path in _entries(directory) if path.name.endswith(".lock")]
    for fd in held:
        if fd is not None:
            os.close(fd)
    return None in held


def _take(path: Path) -> int | None:
    """The lock on a lock file, None while somebody else has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # not ours: then neither is what it guards
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _fix_sweep(world: World, report: Reporter) -> Iterator[str]:
    """By the daemon, which has the locks; one is started where none runs, and sweeps by itself."""
    if world.line is None:
        return
    report.stage("sweep", "giving back what no VM uses")
    if world.daemon().state == "absent":
        yield "started the daemon, which first gives back what no running VM holds"
    yield from world.line.call("daemon.doctor", Doctor(sweep=True), DoctorFacts).swept


def _fix_leftovers(world: World, report: Reporter) -> Iterator[str]:
    yield from _fix_sweep(world, report)
    for path in filter(_is_left, _staging_directories(world)):
        if _remove_unused(path):
            yield f"removed {path}"


def _remove_unused(path: Path) -> bool:
    """Remove a staging directory while holding every lock of its place; False when one is held."""
    held: list[int] = []
    try:
        for lock in _entries(path.parent):
            if lock.name.endswith(".lock"):
                fd = _take(lock)
                if fd is None:
                    return False
                held.append(fd)
        remove_tree(path)
    except OSError as e:
        raise BangerError("operation_failed", f"removing {path}: {e.strerror}") from e
    finally:
        for fd in held:
            os.close(fd)
    return True


CHECKS = (
    Check(
        name="helper",
        look=_look_helper,
        meaning="the root helper answers, and its ledger can be read; without it VMs get QEMU's "
        "own network",
        mends="`sudo -v` or the package that the row names; in system mode "
        "`sudo systemctl restart bangerd-root`",
    ),
    Check(
        name="leases",
        look=_look_leases,
        fix=_fix_sweep,
        needs=("bridge",),
        meaning="the helper's leases against VMs and their processes",
        mends="`--fix` gives back what no running VM holds; a VM without a lease is restarted",
    ),
    Check(
        name="leftovers",
        look=_look_leftovers,
        fix=_fix_leftovers,
        meaning="what a crash left: directories and sockets of no VM, VMM processes, interrupted "
        "builds and pulls",
        mends="`--fix`; a process is yours to end",
    ),
)
