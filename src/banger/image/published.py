"""Images as bundles: taken from what others publish, and written for others.

A pull appears by one rename and, failed, cancelled or killed, leaves nothing. An export is a
stream; whoever writes it to a file gives it the name of its content.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.api.catalog import Exported
from banger.catalog.bundle import bad_bundle, write_bundle
from banger.catalog.published import MANIFEST, Published, fetch_bundle, read_manifest
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.errors import BangerError
from banger.image.entries import (
    ImageManifest,
    Refuse,
    find_image,
    find_manifest,
    get_image,
    is_another,
    lock_image,
    publish_image,
    write_manifest,
)
from banger.image.filesystem import ROOTFS_FILES, rootfs_name
from banger.oci.reference import FileReference, parse_reference
from banger.units import MIB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.api.records import ImageRecord
    from banger.catalog.index import IndexEntry
    from banger.config.paths import Paths
    from banger.progress import Reporter

_REPORT_EVERY_BYTES = 8 * MIB


async def pull_published(
    paths: Paths,
    source: Published,
    entry: IndexEntry,
    *,
    name: str,
    reporter: Reporter,
    replaced: ImageRecord | None = None,
    refuse: Refuse = lambda _: None,
) -> ImageRecord:
    """The published image, stored as `name`; one that is there by then is the result.

    `replaced` is an image of that name that may go, which it does when the new one is whole.

    Raises:
        BangerError: not_found, operation_failed, also with the reasons bad_bundle and disk_full.
    """
    return await run_job(
        lambda job: _pull(paths, source, entry, name, replaced, refuse, job), reporter
    )


def _pull(
    paths: Paths,
    source: Published,
    entry: IndexEntry,
    name: str,
    replaced: ImageRecord | None,
    refuse: Refuse,
    job: Job,
) -> ImageRecord:
    with lock_image(paths, name, job):
        existing = find_image(paths, name)
        if is_another(existing, replaced):
            return existing
        for kind in ("pull", "delete"):
            remove_abandoned(paths.images, f"{kind}-{name}")
        with files.staging_directory(paths.images, f"pull-{name}") as staging:
            image_id = secrets.token_hex(16)
            new = staging / image_id
            new.mkdir(mode=0o755)
            found = fetch_bundle(source, entry, new, (MANIFEST, *ROOTFS_FILES), job)
            _accept(new, entry, name, found, job)
            job.check()
            job.stage("publish", f"storing the image {name}")
            return publish_image(
                paths, new, job=job, replaced=existing, aside=staging, refuse=refuse
            )


def _accept(new: Path, entry: IndexEntry, name: str, found: frozenset[str], job: Job) -> None:
    """Check what came against what the index says, and write the manifest anew."""
    what = f"the bundle {entry.file}"
    manifest = read_manifest(new, ImageManifest, what=what)
    try:
        if found != {MANIFEST, manifest.rootfs_file} or manifest.rootfs_file not in ROOTFS_FILES:
            raise ValueError("it does not hold a manifest and the root filesystem that this names")
        told = (manifest.name, manifest.distro, manifest.arch, manifest.kernel_ref)
        if told != (entry.name, entry.distro, entry.arch, entry.kernel_ref):
            raise ValueError("its manifest says something else than the index")
        rootfs = new / manifest.rootfs_file
        if rootfs_name(rootfs) != manifest.rootfs_file:
            raise ValueError(f"{manifest.rootfs_file} is another filesystem")
        job.stage("verify", f"hashing {entry.name}")
        identity = identify(rootfs)
        if identity.sha256 != manifest.rootfs_sha256:
            raise ValueError("its root filesystem has not the hash of its manifest")
    except ValueError as e:
        raise bad_bundle(f"reading {what}", e) from e
    write_manifest(
        new,
        msgspec.structs.replace(
            manifest,
            name=name,
            rootfs_bytes=identity.size_bytes,
            rootfs_mtime_ns=identity.mtime_ns,
        ),
    )


async def export_image(
    paths: Paths, name: str, *, write: Callable[[bytes], object], reporter: Reporter
) -> Exported:
    """Hand an image's bundle to `write`, piece by piece, from a thread.

    Raises:
        BangerError: not_found; operation_failed, reason files_changed: the stored file is not what
            was recorded. What was written by then is no bundle.
    """
    return await run_job(lambda job: _export(paths, name, write, job), reporter)


def _export(paths: Paths, name: str, write: Callable[[bytes], object], job: Job) -> Exported:
    record = get_image(paths, name)
    stored = find_manifest(paths.images / record.id)
    assert stored is not None
    stored = _without_places(stored)
    rootfs = Path(record.rootfs_path)
    doing = f"exporting the image {record.name}"
    job.stage("export", f"{doing}, {format_size(record.rootfs_bytes)}")
    told = 0

    def advance(done: int) -> None:
        nonlocal told
        job.check()
        if done - told >= _REPORT_EVERY_BYTES:
            told = done
            job.advance(done, record.rootfs_bytes)

    try:
        file = rootfs_name(rootfs)
        manifest = msgspec.structs.replace(stored, rootfs_file=file, rootfs_mtime_ns=0)
        document = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
        sums = write_bundle(write, {MANIFEST: document, file: rootfs}, advance=advance)
    except (OSError, ValueError) as e:
        raise BangerError(
            "operation_failed", f"{doing}: {e}", hint=f"banger image verify {record.name}"
        ) from e
    if sums[file] != stored.rootfs_sha256:
        raise BangerError(
            "operation_failed",
            f"{doing}: {rootfs} is not what was stored",
            hint=f"banger image verify {record.name}",
            reason="files_changed",
        )
    return Exported(
        kind="image",
        name=record.name,
        distro=record.distro,
        arch=record.arch,
        kernel_ref=record.kernel_ref,
        description=stored.description,
    )


def _without_places(manifest: ImageManifest) -> ImageManifest:
    """Where the archive of a container image lay is nobody else's business; its name stays."""
    if manifest.oci is None or not manifest.oci.reference:
        return manifest
    reference = parse_reference(manifest.oci.reference)
    if not isinstance(reference, FileReference):
        return manifest
    name = reference.path.rstrip("/").rpartition("/")[2]
    told = str(msgspec.structs.replace(reference, path=name))
    said = manifest.description == manifest.oci.reference
    return msgspec.structs.replace(
        manifest,
        description=told if said else manifest.description,
        oci=msgspec.structs.replace(manifest.oci, reference=told),
    )
