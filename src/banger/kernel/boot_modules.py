"""The modules that a base initrd needs, taken back out of a `modules.sqfs` that is here already.

A published kernel comes without an initrd, since the guest agent in it is this installation's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger import files
from banger.errors import BangerError
from banger.kernel.base_initrd import build_module_members
from banger.kernel.modules import read_load_order
from banger.kernel.requirements import BOOT_MODULES
from banger.process import ProcessFailed, get_program

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from banger.disk.background import Job
    from banger.disk.cpio import Member

_INDEXES = ("modules.dep", "modules.builtin")


def read_boot_modules(modules: Path, scratch: Path, *, job: Job) -> tuple[Member, ...]:
    """The initrd members for the modules in this squashfs; `scratch` is used meanwhile.

    Raises:
        BangerError: unsquashfs is missing (not_found); it is no squashfs of modules, or one that
            the guest needs is neither there nor built in.
    """
    with files.staging_directory(scratch, "modules") as place:
        _extract(modules, place / "indexes", _INDEXES, job)
        order = read_load_order(place / "indexes", BOOT_MODULES)
        if not order:
            return build_module_members({})
        tree = place / "tree"
        _extract(modules, tree, order, job)
        return build_module_members({path: _read(tree, path) for path in order})


def _extract(modules: Path, target: Path, names: Iterable[str], job: Job) -> None:
    # One processor: the files are few, and the machine has other work.
    argv = [get_program("unsquashfs", package="squashfs-tools"), "-no-progress", "-quiet"]
    argv += ["-no-xattrs", "-processors", "1", "-dest", str(target), str(modules), *names]
    try:
        job.run(argv)
    except ProcessFailed as e:
        raise BangerError("operation_failed", f"reading {modules.name}: {e}") from e
    for name in names:
        _read(target, name)


def _read(tree: Path, name: str) -> bytes:
    path = tree / name
    # A link in it would be followed on this host.
    if not path.resolve().is_relative_to(tree.resolve()) or not path.is_file():
        raise BangerError("operation_failed", f"reading modules.sqfs: it has no file {name}")
    return path.read_bytes()
