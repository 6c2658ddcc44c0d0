"""From built artefacts in the cache to an entry: linked, with this installation's agent.

What comes out of a package and what is compiled here have the same four files there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger import files
from banger.disk.cpio import read_members
from banger.disk.identity import identify
from banger.kernel.base_initrd import write_base_initrd
from banger.kernel.entries import (
    INITRD,
    MODULES,
    VMLINUX,
    KernelManifest,
    get_kernel,
    now_text,
    publish_entry,
    write_manifest,
)

if TYPE_CHECKING:
    from pathlib import Path

    from banger.api.records import KernelRecord
    from banger.config.paths import Paths

# Beside vmlinux and modules.sqfs: the initrd's modules, and the release that the kernel has.
BOOT_ARCHIVE = "boot-modules.cpio"
RELEASE = "release"


def publish_built(
    paths: Paths,
    name: str,
    built: Path,
    agent: Path,
    *,
    distro: str,
    arch: str,
    kernel_version: str,
    source: str,
) -> KernelRecord:
    """Make the artefacts in `built` the entry `name`. The caller holds the lock of the name."""
    with files.staging_directory(paths.kernels, f"pull-{name}") as staging:
        new = staging / "entry"
        new.mkdir(mode=0o755)
        for file in (VMLINUX, MODULES):
            files.link_or_copy(built / file, new / file)
        with (built / BOOT_ARCHIVE).open("rb") as f:
            write_base_initrd(new / INITRD, agent=agent, modules=read_members(f))
        (new / INITRD).chmod(0o444)
        write_manifest(
            new,
            KernelManifest(
                name=name,
                distro=distro,
                arch=arch,
                kernel_version=kernel_version,
                release=(built / RELEASE).read_text(),
                source=source,
                agent_version=files.sha256_file(agent),
                imported_at=now_text(),
                files={file: identify(new / file) for file in (VMLINUX, INITRD, MODULES)},
            ),
        )
        publish_entry(paths, name, new)
    return get_kernel(paths, name)
