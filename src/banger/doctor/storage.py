"""Checks of what banger keeps: its directories, room on the disk, memory, caches, the database."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.settings import default_sizing, host_memory_mib
from banger.doctor.check import Check, Finding, count, failed, passed, warned
from banger.files import can_share_extents, ensure_private_directory, free_bytes
from banger.image.entries import find_damaged
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.doctor.world import World
    from banger.progress import Reporter

_FIX = "banger doctor --fix"
# What a VMM needs beside its guest's memory, MiB (spec 4.9).
_VMM_MIB = 64


def _directories(world: World) -> list[tuple[str, Path]]:
    return [
        ("state", world.paths.state),
        ("cache", world.paths.cache),
        ("runtime", world.paths.runtime),
    ]


def _look_directories(world: World) -> Iterator[Finding]:
    good: list[str] = []
    missing: list[str] = []
    for kind, path in _directories(world):
        problem = _distrust(world, path)
        if problem is not None:
            yield failed(f"the {kind} directory {path} {problem}", command=f"ls -ld {path}")
            continue
        if not path.exists():
            missing.append(f"{kind} {path}")
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _forbidden(kind):
            yield failed(
                f"the {kind} directory {path} is open to others (mode {mode:04o})",
                command=f"chmod 700 {path}",
                fixable=True,
            )
        elif not os.access(path, os.W_OK | os.X_OK):
            yield failed(f"the {kind} directory {path} cannot be written", command=f"ls -ld {path}")
        else:
            good.append(f"{kind} {path} on {_filesystem(world, path)}{_sharing(kind, path)}")
    if missing:
        yield warned(
            f"{count(len(missing), 'directory', 'directories')} not made yet",
            *missing,
            command=_FIX,
            fixable=True,
        )
    if good:
        yield passed(f"{count(len(good), 'directory', 'directories')} with the right mode", *good)
    if world.paths.mode == "system":
        yield from _jail_base(world)


def _forbidden(kind: str) -> int:
    # The cache holds downloads that nobody needs to hide, but nobody else may change them.
    return 0o022 if kind == "cache" else 0o077


def _distrust(world: World, path: Path) -> str | None:
    try:
        st = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as e:
        return f"cannot be looked at: {e.strerror}"
    if not stat.S_ISDIR(st.st_mode):
        return "is no directory"
    if st.st_uid != world.uid:
        return f"belongs to uid {st.st_uid}, not to you (uid {world.uid})"
    return None


def _sharing(kind: str, path: Path) -> str:
    if kind != "state":
        return ""
    try:
        shares = can_share_extents(path)
    except OSError:
        return ""
    return ", which shares copied blocks" if shares else ", without shared blocks"


def _filesystem(world: World, path: Path) -> str:
    return _mount(world, path)[0]


def _mount(world: World, path: Path) -> tuple[str, frozenset[str]]:
    """Type and options of the filesystem of a directory. Source: proc(5), mountinfo."""
    best, found = -1, ("an unknown filesystem", frozenset[str]())
    place = os.path.realpath(path)
    for line in (world.read("/proc/self/mountinfo") or "").splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        if len(words) < 6 or not rest:
            continue
        point = words[4].replace("\\040", " ")
        below = place == point or place.startswith(point.rstrip("/") + "/")
        # The later of two mounts on one point lies on top.
        if below and len(point) >= best:
            best, found = len(point), (rest.split(" ")[0], frozenset(words[5].split(",")))
    return found


def _jail_base(world: World) -> Iterator[Finding]:
    base = Path(world.settings.jailer_chroot_base or world.paths.system.jails)
    options = _mount(world, base)[1] & {"nodev", "noexec"}
    if options:
        yield failed(
            f"jails in {base} would lie on a filesystem that is mounted {' and '.join(options)}",
            "a jail has devices and a program of its own",
            command=f"sudo mount -o remount,dev,exec $(findmnt -nT {base} -o TARGET)",
        )


def _fix_directories(world: World, report: Reporter) -> Iterator[str]:
    for kind, path in _directories(world):
        if _distrust(world, path) is not None:
            continue
        if not path.exists():
            ensure_private_directory(path)
            yield f"made {path} (mode 0700)"
        elif (before := stat.S_IMODE(path.stat().st_mode)) & _forbidden(kind):
            path.chmod(0o700)
            yield f"changed the mode of {path} from {before:04o} to 0700"


def _look_disk(world: World) -> Iterator[Finding]:
    place = _existing(world.paths.state)
    free, reserve = free_bytes(place), world.settings.disk_reserve_bytes
    promised = sum(vm.overlay_bytes + vm.work_disk_bytes for vm in world.vms)
    written = sum(
        _allocated(path)
        for vm in world.vms
        for path in (world.paths.vm(vm.id).overlay, world.paths.vm(vm.id).work)
    )
    figures = f"{_size(free)} free, {_size(reserve)} kept in reserve (disk_reserve)"
    disks = f"disks of {count(len(world.vms), 'VM')}: {_size(promised)} promised, {_size(written)} "
    details = [disks + "written"]
    if promised - written > free - reserve:
        details.append("VMs that fill their disks will meet a full host disk")
    if free < reserve:
        yield failed(
            f"{place}: {figures}; no VM starts and nothing is built", *details,
            command="banger vm prune",
        )  # fmt: skip
    elif free < 2 * reserve:
        yield warned(f"{place}: {figures}; it is nearly full", *details, command="banger vm prune")
    else:
        yield passed(f"{place}: {figures}", *details)


def _look_memory(world: World) -> Iterator[Finding]:
    total, percent = host_memory_mib(), world.settings.memory_budget_percent
    budget = total * percent // 100
    live = [vm for vm in world.vms if vm.id in world.live()]
    used = sum(vm.memory_mib + _VMM_MIB for vm in live)
    figures = f"{budget} of {total} MiB are for VMs (memory_budget_percent = {percent})"
    details = tuple(f"{vm.name}: {vm.memory_mib} + {_VMM_MIB} MiB" for vm in live)
    sizes = default_sizing(
        world.settings.vm_defaults, host_cpus=os.cpu_count() or 1, host_memory_mib=total
    )
    if used > budget:
        yield warned(
            f"{figures}, and running VMs have {used} MiB", *details,
            command=f"banger vm stop {live[-1].name}",
        )  # fmt: skip
    elif sizes.memory_mib + _VMM_MIB > budget:
        yield failed(
            f"{figures}, less than the default VM takes ({sizes.memory_mib} + {_VMM_MIB} MiB)",
            "set memory_mib of [vm_defaults], or memory_budget_percent",
            command=f"$EDITOR {world.config_files[-1]}",
        )
    else:
        yield passed(f"{figures}; running VMs have {used} MiB", *details)


def _look_store(world: World) -> Iterator[Finding]:
    store, path = world.store(), world.paths.database
    aside = f"mv {path} {path}.damaged"
    if store.problem is not None:
        yield failed(store.problem, command=f"ls -l {path}*")
        return
    look = store.look
    if look is None:
        yield passed(f"there is no database yet: the daemon makes {path}")
    elif look.problems:
        yield failed(
            f"the database {path} is damaged",
            *look.problems,
            "put aside, it is made anew, without its VMs",
            command=aside,
        )
    elif look.version > look.known_version:
        yield failed(
            f"the database {path} is of version {look.version}, this program knows "
            f"{look.known_version}: a newer banger wrote it",
            command="banger version",
        )
    elif look.version < look.known_version:
        yield passed(
            f"the database is of version {look.version}; the next daemon brings it to "
            f"{look.known_version}"
        )
    else:
        yield passed(f"the database can be read: {count(len(world.vms), 'VM')}")


def _look_cache(world: World) -> Iterator[Finding]:
    paths = world.paths
    kinds = {
        "images": paths.images,
        "kernels": paths.kernels,
        "blank disks": paths.templates,
        "programs": paths.state / "bin",
        **{f"cache of {p.name}": p for p in _entries(paths.cache)},
    }
    limits = {"cache of oci": f", at most {_size(world.settings.oci_cache_limit_bytes)} of layers"}
    sizes = {kind: _tree_bytes(path) for kind, path in kinds.items()}
    details = [
        f"{kind}: {_size(size)}{limits.get(kind, '')}" for kind, size in sizes.items() if size
    ]
    yield passed(f"{_size(sum(sizes.values()))} in images, kernels and caches", *details)
    for damaged in find_damaged(paths):
        yield failed(
            f"{damaged}",
            "the image cannot be used, listed or deleted; its VMs start again when the file is put "
            "back from a backup, or read by the banger that wrote it",
            command=damaged.hint,
        )


def _tree_bytes(directory: Path) -> int:
    """Bytes on disk of everything in a directory; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                st = os.lstat(os.path.join(place, name))  # noqa: PTH118 - many files
            except OSError:
                continue
            if (st.st_dev, st.st_ino) not in seen:
                seen.add((st.st_dev, st.st_ino))
                total += st.st_blocks * 512
    return total


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(p for p in directory.iterdir() if p.is_dir())
    except OSError:
        return []


def _size(size_bytes: int) -> str:
    return format_size(size_bytes if size_bytes < 10 * MIB else size_bytes // MIB * MIB)


CHECKS = (
    Check(
        name="store",
        look=_look_store,
        meaning="the database can be read, is whole, and of a version that this program knows; it "
        "is opened read-only",
        mends="putting a damaged one aside; the banger that wrote a newer one",
    ),
    Check(
        name="directories",
        look=_look_directories,
        fix=_fix_directories,
        meaning="state, cache and runtime: yours, not open to others, on which filesystem, and "
        "whether copies share blocks there; in system mode the jails' filesystem",
        mends="`--fix` makes them and sets their mode; somebody else's is yours to move",
    ),
    Check(
        name="disk space",
        look=_look_disk,
        meaning="free bytes against `disk_reserve`, and what disks of VMs promise and hold; FAIL "
        "below the reserve",
        mends="`banger vm prune`, `banger image delete`",
    ),
    Check(
        name="memory",
        look=_look_memory,
        meaning="the memory budget, running VMs, and whether a default VM fits",
        mends="stopping a VM, a smaller default, another `memory_budget_percent`",
    ),
    Check(
        name="cache",
        look=_look_cache,
        meaning="bytes on disk of images, kernels and each cache, and the limit of the layers "
        "(`oci_cache_limit`); FAIL where the manifest of an image cannot be read",
        mends="`banger image delete`, `banger kernel rm`, `banger image cache prune`; "
        "caches may be removed while no command runs",
    ),
)
