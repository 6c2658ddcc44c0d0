"""Kernel entries as bundles: taken from what others publish, and written for others.

A bundle holds kernel and modules; the base initrd is made here, with this installation's agent. A
pull appears by one rename and, failed, cancelled or killed, leaves nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.api.catalog import Exported
from banger.catalog.bundle import bad_bundle, write_bundle
from banger.catalog.published import MANIFEST, Published, fetch_bundle, read_manifest
from banger.config.resources import agent_binary
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.errors import BangerError
from banger.kernel.base_initrd import write_base_initrd
from banger.kernel.boot_modules import read_boot_modules
from banger.kernel.entries import (
    INITRD,
    MODULES,
    VMLINUX,
    KernelManifest,
    find_kernel,
    find_manifest,
    get_kernel,
    lock_kernel,
    now_text,
    publish_entry,
    write_manifest,
)
from banger.kernel.vmlinux import extract_vmlinux
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.api.records import KernelRecord
    from banger.catalog.index import IndexEntry
    from banger.config.paths import Paths
    from banger.progress import Reporter

_SHIPPED = (VMLINUX, MODULES)
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}")
_REPORT_EVERY_BYTES = 8 * MIB


async def pull_published_kernel(
    paths: Paths,
    source: Published,
    entry: IndexEntry,
    *,
    reporter: Reporter,
    force: bool = False,
) -> KernelRecord:
    """The published kernel as an entry; without `force` one that is there by then is the result.

    Raises:
        BangerError: not_found, operation_failed, also with the reasons bad_bundle and disk_full.
    """
    return await run_job(lambda job: _pull(paths, source, entry, force, job), reporter)


def _pull(
    paths: Paths, source: Published, entry: IndexEntry, force: bool, job: Job
) -> KernelRecord:
    agent = agent_binary(entry.arch)
    with lock_kernel(paths, entry.name, job):
        if not force and (made_by_peer := find_kernel(paths, entry.name)):
            return made_by_peer
        for kind in ("pull", "delete"):
            remove_abandoned(paths.kernels, f"{kind}-{entry.name}")
        with files.staging_directory(paths.kernels, f"pull-{entry.name}") as staging:
            new = staging / "entry"
            new.mkdir(mode=0o755)
            found = fetch_bundle(source, entry, new, (MANIFEST, *_SHIPPED), job)
            manifest = _accept(new, entry, found, job)
            job.stage("kernel", f"making the initrd of {entry.name}")
            modules = read_boot_modules(new / MODULES, staging, job=job)
            write_base_initrd(new / INITRD, agent=agent, modules=modules)
            (new / INITRD).chmod(0o444)
            write_manifest(
                new,
                msgspec.structs.replace(
                    manifest,
                    source=f"bundle:{entry.file}",
                    agent_version=files.sha256_file(agent),
                    imported_at=now_text(),
                    files={name: identify(new / name) for name in (VMLINUX, INITRD, MODULES)},
                ),
            )
            job.check()
            publish_entry(paths, entry.name, new)
    return get_kernel(paths, entry.name)


def _accept(new: Path, entry: IndexEntry, found: frozenset[str], job: Job) -> KernelManifest:
    what = f"the bundle {entry.file}"
    manifest = read_manifest(new, KernelManifest, what=what)
    try:
        if found != {MANIFEST, *_SHIPPED} or set(manifest.files) != set(_SHIPPED):
            raise ValueError(f"it does not hold {', '.join(_SHIPPED)} and their manifest")
        told = (manifest.name, manifest.distro, manifest.arch, manifest.kernel_version)
        if told != (entry.name, entry.distro, entry.arch, entry.kernel_version):
            raise ValueError("its manifest says something else than the index")
        if not _RELEASE.fullmatch(manifest.release):
            raise ValueError("its release is no kernel's")
        job.stage("verify", f"hashing {entry.name}")
        for name in _SHIPPED:
            if files.sha256_file(new / name) != manifest.files[name].sha256:
                raise ValueError(f"{name} has not the hash of its manifest")
        with (new / VMLINUX).open("rb") as f:
            # Both VMMs load it as it is: a compressed image would do nothing at all.
            if not (head := f.read(64)).startswith(b"\x7fELF"):
                raise ValueError("vmlinux is no ELF file")
        extract_vmlinux(head)
    except ValueError as e:
        raise bad_bundle(f"reading {what}", e) from e
    return manifest


async def export_kernel(
    paths: Paths, name: str, *, write: Callable[[bytes], object], reporter: Reporter
) -> Exported:
    """Hand a kernel's bundle to `write`, piece by piece, from a thread.

    Raises:
        BangerError: not_found; operation_failed, reason files_changed: a stored file is not what
            was recorded. What was written by then is no bundle.
    """
    return await run_job(lambda job: _export(paths, name, write, job), reporter)


def _export(paths: Paths, name: str, write: Callable[[bytes], object], job: Job) -> Exported:
    record = get_kernel(paths, name)
    directory = Path(record.directory)
    stored = find_manifest(directory)
    assert stored is not None
    doing = f"exporting the kernel {name}"
    known = {file: stored.files[file] for file in _SHIPPED}
    total = sum(identity.size_bytes for identity in known.values())
    job.stage("export", f"{doing}, {format_size(total)}")
    told = 0

    def advance(done: int) -> None:
        nonlocal told
        job.check()
        if done - told >= _REPORT_EVERY_BYTES:
            told = done
            job.advance(done, total)

    manifest = msgspec.structs.replace(
        stored,
        # Where it came from on this host is nobody's business.
        source="",
        agent_version="",
        files={file: msgspec.structs.replace(known[file], mtime_ns=0) for file in _SHIPPED},
    )
    document = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"
    members: dict[str, Path | bytes] = {MANIFEST: document}
    members |= {file: directory / file for file in _SHIPPED}
    again = f"banger kernel pull {name} --force"
    try:
        sums = write_bundle(write, members, advance=advance)
    except OSError as e:
        raise BangerError("operation_failed", f"{doing}: {e}", hint=again) from e
    if changed := [file for file in _SHIPPED if sums[file] != known[file].sha256]:
        raise BangerError(
            "operation_failed",
            f"{doing}: {', '.join(changed)} is not what was stored",
            hint=again,
            reason="files_changed",
        )
    return Exported(
        kind="kernel",
        name=name,
        distro=record.distro,
        arch=record.arch,
        kernel_version=record.kernel_version,
        description=f"Linux {record.release}",
    )
