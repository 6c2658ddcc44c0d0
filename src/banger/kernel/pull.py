"""Getting kernel entries: from the host's apt, through the build cache, into the state directory.

One pull of a name at a time, between processes too; who waited for a peer's pull shares its result.
A pull that fails, is cancelled or killed leaves no entry and no part of one.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.config.resources import agent_binary
from banger.disk.artefacts import built_artefacts, inputs_key, remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.kernel import apt
from banger.kernel.base_initrd import read_module_members, write_base_initrd
from banger.kernel.built import publish_built
from banger.kernel.entries import (
    INITRD,
    KernelManifest,
    find_kernel,
    find_manifest,
    lock_kernel,
    refuse_existing,
    write_manifest,
)
from banger.kernel.package import BUILDER_VERSION, build_entry_files
from banger.names import check_entry_name
from banger.units import GIB, MIB

if TYPE_CHECKING:
    from banger.api.records import KernelRecord
    from banger.config.paths import Paths
    from banger.progress import Reporter

# Package, unpacked tree, squashfs, vmlinux and their cached copies, as seen with 6.12.
_NEEDED_BYTES = 600 * MIB


class CatalogKernel(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel that banger knows how to get. `package` is a pattern for the whole name."""

    name: str
    distro: str
    arch: str
    package: str
    package_prefix: str
    suite: str
    description: str


CATALOG = (
    CatalogKernel(
        name="debian-6.12-cloud",
        distro="debian",
        arch="amd64",
        package=r"linux-image-6\.12\.[0-9]+\+\S*cloud-amd64(-unsigned)?",
        package_prefix="linux-image-6.12.",
        suite="bookworm-security, bookworm-backports or trixie",
        description="Debian's 6.12 kernel for virtual machines",
    ),
)


def find_catalog_kernel(name: str) -> CatalogKernel | None:
    """The catalog's entry of this name, or None."""
    return next((entry for entry in CATALOG if entry.name == name), None)


async def pull_kernel(
    paths: Paths,
    name: str,
    *,
    reporter: Reporter,
    force: bool = False,
    reserve_bytes: int = 2 * GIB,
) -> KernelRecord:
    """Get the newest package of a catalog kernel and make it an entry.

    `force` replaces an entry; running VMs keep the files they have open. Cancelling stops the host
    programs and leaves nothing.

    Raises:
        BangerError: already_exists without `force`; not_found: not in the catalog, or not in the
            host's apt sources; operation_failed, also with reason disk_full.
    """
    check_entry_name(name, "kernel")
    refuse_existing(paths, name, force=force)
    return await run_job(
        lambda job: _pull(paths, name, force=force, reserve_bytes=reserve_bytes, job=job), reporter
    )


async def ensure_kernel(
    paths: Paths, name: str, *, reporter: Reporter, reserve_bytes: int = 2 * GIB
) -> KernelRecord:
    """The entry of this name with the present agent in it, pulled first when there is none.

    Raises:
        BangerError: as `pull_kernel` and `ensure_base_initrd`.
    """

    def work(job: Job) -> KernelRecord:
        record = find_kernel(paths, name) or _pull(
            paths, name, force=False, reserve_bytes=reserve_bytes, job=job
        )
        return ensure_base_initrd(paths, record)

    return await run_job(work, reporter)


def ensure_base_initrd(paths: Paths, record: KernelRecord) -> KernelRecord:
    """The entry with the installed agent in its base initrd, rebuilt when the agents differ.

    Raises:
        BangerError: not_found: no agent here, or the entry is gone; operation_failed: the initrd
            cannot be read.
    """
    agent = agent_binary(record.arch)
    version = files.sha256_file(agent)
    if record.agent_version == version:
        return record
    with lock_kernel(paths, record.name, Job()):
        directory = Path(record.directory)
        manifest = find_manifest(directory)
        if manifest is None:
            raise BangerError(
                "not_found",
                f"the kernel {record.name} is gone",
                hint=f"banger kernel pull {record.name}",
            )
        if manifest.agent_version != version:
            manifest = _replace_agent(directory, manifest, agent, version)
        return write_manifest(directory, manifest)


def _replace_agent(
    directory: Path, manifest: KernelManifest, agent: Path, version: str
) -> KernelManifest:
    beside = directory / f".{INITRD}.{secrets.token_hex(4)}"
    try:
        members = tuple(read_module_members(directory / INITRD))
        write_base_initrd(beside, agent=agent, modules=members)
        beside.chmod(0o444)
        files.sync_file(beside)
        identity = identify(beside)
        # The initrd first: killed between the two, the manifest still names the old agent, and the
        # next call writes both anew.
        beside.replace(directory / INITRD)
    except (OSError, ValueError) as e:
        raise BangerError(
            "operation_failed",
            f"putting the installed guest agent into the kernel {manifest.name}: {e}",
            hint=f"banger kernel pull {manifest.name} --force",
        ) from e
    finally:
        beside.unlink(missing_ok=True)
    return msgspec.structs.replace(
        manifest, agent_version=version, files=manifest.files | {INITRD: identity}
    )


def _pull(paths: Paths, name: str, *, force: bool, reserve_bytes: int, job: Job) -> KernelRecord:
    entry = find_catalog_kernel(name)
    if entry is None:
        raise BangerError(
            "not_found",
            f"{name!r} is no kernel of the catalog",
            hint="banger kernel list --available",
        )
    agent = agent_binary(entry.arch)
    with lock_kernel(paths, name, job):
        if not force and (made_by_peer := find_kernel(paths, name)):
            return made_by_peer
        require_space(
            paths.kernels,
            needed_bytes=_NEEDED_BYTES,
            reserve_bytes=reserve_bytes,
            doing=f"pulling the kernel {name}",
        )
        remove_abandoned(paths.kernels, f"pull-{name}")
        remove_abandoned(paths.kernels, f"delete-{name}")
        job.stage("kernel", f"looking for the newest {name} kernel")
        package = apt.find_newest(
            entry.package,
            prefix=entry.package_prefix,
            suite=entry.suite,
            entry=name,
            job=job,
        )
        key = inputs_key((BUILDER_VERSION, package.name, package.version, package.sha256))

        def build(staging: Path) -> None:
            with files.staging_directory(staging, "download") as downloads:
                job.stage("kernel", f"downloading {package.name} {package.version}")
                deb = apt.download(package, downloads, job=job)
                job.stage("kernel", f"unpacking {package.name}")
                build_entry_files(deb, staging, job=job)

        cache = paths.build_cache / "kernels" / name
        with built_artefacts(cache, key, build, job=job) as built:
            job.check()
            return publish_built(
                paths,
                name,
                built,
                agent,
                distro=entry.distro,
                arch=entry.arch,
                kernel_version=package.version,
                source=f"apt:{package.name}={package.version}",
            )
