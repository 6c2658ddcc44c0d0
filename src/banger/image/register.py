"""Images out of files of the user's: registered where they lie, or copied into the state directory.

A registered file stays the user's: it is read by VMs, never written, and only its entry is removed.
`promote` makes such an image banger's own, under the same id, so that its VMs stay with it.
"""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import FileChanged, check_identity, identify
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.faults import step
from banger.image.entries import (
    ImageManifest,
    find_image,
    find_manifest,
    get_image,
    lock_image,
    publish_image,
    write_manifest,
)
from banger.image.filesystem import rootfs_name
from banger.names import check_entry_name

if TYPE_CHECKING:
    from banger.api.records import ImageRecord
    from banger.config.paths import Paths
    from banger.progress import Reporter


async def register_image(
    paths: Paths,
    *,
    name: str,
    rootfs: Path,
    kernel_ref: str,
    distro: str,
    reporter: Reporter,
) -> ImageRecord:
    """An image of the root filesystem at the absolute path `rootfs`, which stays there.

    Raises:
        BangerError: already_exists; bad_request: it is no file, or neither squashfs nor ext4.
    """
    check_entry_name(name, "image")
    return await run_job(
        lambda job: _register(paths, name, rootfs, kernel_ref, distro, job), reporter
    )


async def promote_image(
    paths: Paths, name: str, *, reporter: Reporter, reserve_bytes: int
) -> ImageRecord:
    """Copy the root filesystem of a registered image into the state directory; done before: fine.

    Raises:
        BangerError: not_found; operation_failed, also with the reasons files_changed, disk_full.
    """
    return await run_job(lambda job: _promote(paths, name, reserve_bytes, job), reporter)


def check_rootfs(rootfs: Path) -> str:
    """The name that this file would have in a managed image.

    Raises:
        BangerError: bad_request: it cannot be an image.
    """
    doing = f"registering {rootfs}"
    if not rootfs.is_absolute():
        raise BangerError(
            "bad_request", f"{doing}: the path must be absolute", hint="banger image register -h"
        )
    try:
        if not rootfs.is_file():
            raise ValueError("there is no such file")
        return rootfs_name(rootfs)
    except (OSError, ValueError) as e:
        words = (e.strerror or str(e)) if isinstance(e, OSError) else str(e)
        raise BangerError("bad_request", f"{doing}: {words}", hint=f"file {rootfs}") from e


def _register(
    paths: Paths, name: str, rootfs: Path, kernel_ref: str, distro: str, job: Job
) -> ImageRecord:
    check_rootfs(rootfs)
    with lock_image(paths, name, job):
        refuse_existing(paths, name)
        remove_abandoned(paths.images, f"register-{name}")
        job.stage("image", f"hashing {rootfs}")
        identity = identify(rootfs)
        job.check()
        image_id = secrets.token_hex(16)
        with files.staging_directory(paths.images, f"register-{name}") as staging:
            new = staging / image_id
            new.mkdir(mode=0o755)
            now = datetime.datetime.now(datetime.UTC)
            write_manifest(
                new,
                ImageManifest(
                    name=name,
                    distro=distro,
                    arch="amd64",
                    kernel_ref=kernel_ref,
                    rootfs_file=str(rootfs),
                    rootfs_sha256=identity.sha256,
                    rootfs_bytes=identity.size_bytes,
                    rootfs_mtime_ns=identity.mtime_ns,
                    created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
                ),
            )
            return publish_image(paths, new, job=job)


def refuse_existing(paths: Paths, name: str) -> None:
    """Raises BangerError, already_exists, when there is an image of this name."""
    if find_image(paths, name) is not None:
        raise BangerError(
            "already_exists",
            f"there is an image {name} already",
            hint=f"banger image delete {name}",
        )


def _promote(paths: Paths, name_or_id: str, reserve_bytes: int, job: Job) -> ImageRecord:
    name = get_image(paths, name_or_id).name
    with lock_image(paths, name, job):
        record = get_image(paths, name)
        if record.managed:
            return record
        directory = paths.images / record.id
        manifest = find_manifest(directory)
        assert manifest is not None
        source = Path(record.rootfs_path)
        target = directory / check_rootfs(source)
        require_space(
            directory,
            needed_bytes=source.stat().st_blocks * 512,
            reserve_bytes=reserve_bytes,
            doing=f"promoting the image {name}",
        )
        job.stage("image", f"copying {source}")
        remove_abandoned(directory, "promote")
        with files.staging_directory(directory, "promote") as staging:
            copy = staging / target.name
            with step("promote.copy"):
                files.clone(source, copy, mode=0o444)
            job.check()
            try:
                # What was copied must be what was registered: the file is the user's, and may be
                # written meanwhile.
                identity = check_identity(copy, manifest.identity, hash_always=True)
            except FileChanged as e:
                raise BangerError(
                    "operation_failed",
                    f"promoting the image {name}: {source} is not what was registered",
                    hint=f"banger image delete {name}",
                    reason="files_changed",
                ) from e
            with step("promote.place"):
                files.sync_file(copy)
                copy.replace(target)
                files.sync_directory(directory)
        with step("promote.record"):
            write_manifest(
                directory,
                msgspec.structs.replace(
                    manifest, rootfs_file=target.name, rootfs_mtime_ns=identity.mtime_ns
                ),
            )
    return get_image(paths, record.id)
