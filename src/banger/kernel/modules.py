"""The kernel's modules: which depend on which, and in what order the agent loads them.

Works on a tree `<base>/lib/modules/<release>` of uncompressed modules. The index files that a
guest's modprobe reads are made by the host's depmod, the program that defines their format.
"""

from __future__ import annotations

import tarfile
from typing import IO, TYPE_CHECKING

from banger.disk.squashfs import DEFAULT_EPOCH, open_tar_writer, write_squashfs
from banger.errors import BangerError
from banger.process import get_program

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from banger.disk.background import Job


def write_module_indexes(base: Path, release: str, *, job: Job) -> None:
    """Run depmod over `<base>/lib/modules/<release>`.

    Raises:
        BangerError: depmod is missing (not_found) or failed.
    """
    depmod = get_program("depmod", package="kmod")
    job.run([depmod, "-b", str(base), release])


def read_load_order(directory: Path, wanted: Iterable[str]) -> tuple[str, ...]:
    """Paths below `directory` of the wanted modules and all they need, each after its needs.

    What is built into the kernel is left out. `directory` is `lib/modules/<release>` after depmod.

    Raises:
        BangerError: a wanted module is neither there nor built in.
    """
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {_module_name(path): path for path in needs}
    built_in = {_module_name(line) for line in (directory / "modules.builtin").read_text().split()}
    order: dict[str, None] = {}

    def visit(path: str) -> None:
        if path not in order:
            for need in needs[path]:
                visit(need)
            order[path] = None

    for name in wanted:
        if found := by_name.get(name):
            visit(found)
        elif name not in built_in:
            raise BangerError(
                "operation_failed",
                f"the kernel {directory.name} has no module {name}, which a guest needs to boot",
                hint="banger kernel list --available",
            )
    return tuple(order)


def write_modules_squashfs(directory: Path, target: Path, *, job: Job) -> None:
    """Write `lib/modules/<release>` as a squashfs whose root is that directory, all owned by root.

    Raises:
        BangerError: as `write_squashfs`.
    """

    def feed(stream: IO[bytes]) -> None:
        with open_tar_writer(stream) as tar:
            for path in sorted(directory.rglob("*")):
                job.check()
                info = tarfile.TarInfo(path.relative_to(directory).as_posix())
                info.mtime = DEFAULT_EPOCH
                if path.is_dir():
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)
                else:
                    info.size, info.mode = path.stat().st_size, 0o644
                    with path.open("rb") as f:
                        tar.addfile(info, f)

    write_squashfs(target, feed, job=job, all_root=True)


def _module_name(path: str) -> str:
    """`kernel/net/core/net-failover.ko` → `net_failover`, as modprobe(8) takes the two for one."""
    return path.rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_")
