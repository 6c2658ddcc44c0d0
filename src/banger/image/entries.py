"""Stored images: `<state>/images/<id>/` with manifest.json, which is the truth about them.

An image appears and disappears by a rename. A managed image holds its root filesystem; an unmanaged
one names a file of the user's by its absolute path. There is no database row.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard

import msgspec

from banger import files
from banger.api.records import ImageConfig, ImageRecord
from banger.decoding import MALFORMED, decode_json
from banger.disk.background import Job
from banger.disk.identity import FileChanged, FileIdentity, check_identity
from banger.errors import BangerError
from banger.faults import step
from banger.names import check_entry_name

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from banger.config.paths import Paths

log = logging.getLogger(__name__)

ROOTFS = "rootfs.sqfs"
MANIFEST = "manifest.json"

Refuse = Callable[[ImageRecord], None]
"""Raises BangerError when this image may not go: only who knows the VMs can tell."""


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json` of an image (spec 5.1). `rootfs_mtime_ns` is for the check at each start."""

    schema: Literal[1] = 1
    name: str
    distro: str
    arch: str
    kernel_ref: str
    rootfs_file: str
    rootfs_sha256: str
    rootfs_bytes: int
    rootfs_mtime_ns: int
    features: tuple[str, ...] = ()
    recipe: str | None = None
    optional_missing: tuple[str, ...] = ()
    install_sshd: bool = False
    description: str = ""
    created_at: str = ""
    oci: ImageConfig | None = None

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(
            sha256=self.rootfs_sha256, size_bytes=self.rootfs_bytes, mtime_ns=self.rootfs_mtime_ns
        )


def find_image(paths: Paths, name_or_id: str) -> ImageRecord | None:
    """The image with this name or this id, or None.

    Raises:
        BangerError: the name is not allowed, or the manifest of the image with this id cannot be
            read.
    """
    check_entry_name(name_or_id, "image")
    if manifest := find_manifest(paths.images / name_or_id):
        return _record(paths.images / name_or_id, manifest)
    return next((r for r in list_images(paths) if r.name == name_or_id), None)


def is_another(
    existing: ImageRecord | None, replaced: ImageRecord | None
) -> TypeGuard[ImageRecord]:
    """Whether a name is taken by another image than the one that may be replaced."""
    return existing is not None and (replaced is None or existing.id != replaced.id)


def get_image(paths: Paths, name_or_id: str) -> ImageRecord:
    """As `find_image`, but a missing image is not_found."""
    record = find_image(paths, name_or_id)
    if record is None:
        raise BangerError(
            "not_found",
            f"there is no image {name_or_id!r} here" + _but(paths),
            hint="banger image list",
        )
    return record


def _but(paths: Paths) -> str:
    damaged = len(find_damaged(paths))
    return f"; {damaged} here cannot be read, see: banger doctor" if damaged else ""


def list_images(paths: Paths) -> tuple[ImageRecord, ...]:
    """All images, by name; of two with one name (see `publish_image`) the newest comes first.

    One whose manifest is damaged, or of a newer banger, has no name and is none of them: it keeps
    nobody from using the others. By its id it is found, and told (see `find_damaged`).
    """
    found, damaged = _read_images(paths)
    for error in damaged:
        log.warning("left out: %s", error)
    found.sort(key=lambda record: record.created_at, reverse=True)
    return tuple(sorted(found, key=lambda record: record.name))


def find_damaged(paths: Paths) -> list[BangerError]:
    """What is wrong with each image that `list_images` leaves out."""
    return _read_images(paths)[1]


def _read_images(paths: Paths) -> tuple[list[ImageRecord], list[BangerError]]:
    try:
        directories = [p for p in paths.images.iterdir() if re.fullmatch(r"[0-9a-f]{32}", p.name)]
    except FileNotFoundError:
        return [], []
    found, damaged = [], []
    for directory in directories:
        try:
            if manifest := find_manifest(directory):
                found.append(_record(directory, manifest))
        except BangerError as e:
            damaged.append(e)
    return found, damaged


def delete_image(
    paths: Paths, name_or_id: str, *, job: Job | None = None, refuse: Refuse = lambda _: None
) -> ImageRecord:
    """Remove an image, of an unmanaged one only the entry; return what it was.

    Waits for whoever makes an image of this name: not for the event loop's thread.

    Raises:
        BangerError: not_found; what `refuse` raises.
    """
    job = job or Job()
    known = get_image(paths, name_or_id)
    with (
        lock_image(paths, known.name, job),
        files.staging_directory(paths.images, f"delete-{known.name}") as aside,
        step("discard.image"),
    ):
        # By its id: another one has the name where a replacement was cut half-way.
        gone = job.at_once(lambda: put_aside(paths, get_image(paths, known.id), aside, refuse))
        files.sync_directory(paths.images)
    return gone


def find_shadowed(paths: Paths) -> tuple[ImageRecord, ...]:
    """Images whose name a newer one has: somebody was killed between publishing that and putting
    these aside."""
    newest: dict[str, ImageRecord] = {}
    shadowed = []
    for image in sorted(list_images(paths), key=lambda i: (paths.images / i.id).stat().st_mtime_ns):
        if (older := newest.get(image.name)) is not None:
            shadowed.append(older)
        newest[image.name] = image
    return tuple(shadowed)


def put_aside(
    paths: Paths, record: ImageRecord, aside: Path, refuse: Refuse = lambda _: None
) -> ImageRecord:
    """Take an image out of sight by one rename: it is never seen half removed."""
    refuse(record)
    (paths.images / record.id).rename(aside / record.id)
    return record


def verify_image(paths: Paths, name_or_id: str) -> tuple[str, ...]:
    """Hash the stored root filesystem; what differs from the manifest, in words."""
    record = get_image(paths, name_or_id)
    try:
        check_identity(
            Path(record.rootfs_path), _manifest(paths, record).identity, hash_always=True
        )
    except FileChanged as e:
        return (str(e),)
    return ()


def check_image_files(paths: Paths, record: ImageRecord) -> None:
    """The preflight of a start: the root filesystem is there with unchanged size and time.

    With another time it is hashed; when its content is what was recorded, the new time is recorded.

    Raises:
        BangerError: operation_failed, reason files_changed. not_found: the image is gone.
    """
    manifest = _manifest(paths, record)
    try:
        found = check_identity(Path(record.rootfs_path), manifest.identity)
    except FileChanged as e:
        raise BangerError(
            "operation_failed",
            f"the image {record.name} is not what was stored: {e}",
            hint=f"banger image verify {record.name}",
            reason="files_changed",
        ) from e
    if found != manifest.identity:
        write_manifest(
            paths.images / record.id,
            msgspec.structs.replace(manifest, rootfs_mtime_ns=found.mtime_ns),
        )


def lock_image(paths: Paths, name: str, job: Job) -> AbstractContextManager[None]:
    """The lock that building and deleting an image of one name share."""
    return job.locked(paths.images / f".{check_entry_name(name, 'image')}.lock")


def find_manifest(directory: Path) -> ImageManifest | None:
    """The manifest in `directory`; None when there is none.

    Raises:
        BangerError: operation_failed: it cannot be read, or says nothing sensible.
    """
    path = directory / MANIFEST
    try:
        return decode_json(path.read_bytes(), type=ImageManifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *MALFORMED) as e:
        raise BangerError(
            "operation_failed", f"reading the image manifest {path}: {e}", hint=f"ls -l {path}"
        ) from e


def write_manifest(directory: Path, manifest: ImageManifest) -> None:
    """Write `manifest.json` into an image's directory."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    files.write_atomic(directory / MANIFEST, content + b"\n", mode=0o444)


def publish_image(
    paths: Paths,
    new: Path,
    *,
    job: Job,
    replaced: ImageRecord | None = None,
    aside: Path | None = None,
    refuse: Refuse = lambda _: None,
) -> ImageRecord:
    """Store a finished directory, named by the image's id; `replaced` goes to `aside` after it.

    A name is never without its image: whoever is killed between the two leaves both.

    Raises:
        BangerError: what `refuse` raises of the image to be replaced; both are as they were.
    """
    with step("image.sync"):
        files.sync_tree(new)

    def publish() -> None:
        if replaced is not None:
            refuse(replaced)
        new.rename(paths.images / new.name)
        if replaced is not None and aside is not None:
            put_aside(paths, replaced, aside)

    with step("image.publish"):
        job.at_once(publish)
        files.sync_directory(paths.images)
    return get_image(paths, new.name)


def _manifest(paths: Paths, record: ImageRecord) -> ImageManifest:
    manifest = find_manifest(paths.images / record.id)
    if manifest is None:
        raise BangerError("not_found", f"the image {record.name} is gone", hint="banger image list")
    return manifest


def _record(directory: Path, m: ImageManifest) -> ImageRecord:
    return ImageRecord(
        id=directory.name,
        name=m.name,
        distro=m.distro,
        arch=m.arch,
        kernel_ref=m.kernel_ref,
        rootfs_path=str(directory / m.rootfs_file),  # an absolute rootfs_file stays what it is
        rootfs_sha256=m.rootfs_sha256,
        rootfs_bytes=m.rootfs_bytes,
        managed=not Path(m.rootfs_file).is_absolute(),
        features=m.features,
        recipe=m.recipe,
        optional_missing=m.optional_missing,
        install_sshd=m.install_sshd,
        description=m.description,
        created_at=m.created_at,
        oci=m.oci,
    )
