"""Pulling container images: reference → layers → merged tar → squashfs → stored image.

One pull is one job in a thread. Blobs from a registry stay in the cache, which all images share;
everything else that a failed, cancelled or killed pull made is removed, by itself or by the next.
"""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from banger import files
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.disk.squashfs import write_squashfs
from banger.errors import BangerError
from banger.faults import step
from banger.image.cache import require_room
from banger.image.entries import (
    ROOTFS,
    ImageManifest,
    Refuse,
    find_image,
    find_manifest,
    get_image,
    list_images,
    lock_image,
    publish_image,
    write_manifest,
)
from banger.image.sources import open_source
from banger.names import is_temporary_image
from banger.oci.documents import count_layers, guest_config
from banger.oci.errors import reading
from banger.oci.merge import Merged, index_layers, write_merged
from banger.oci.reference import (
    FileReference,
    RegistryReference,
    check_platform,
    default_name,
    parse_reference,
)
from banger.units import GIB, MIB

if TYPE_CHECKING:
    from banger.api.records import ImageConfig, ImageRecord
    from banger.config.paths import Paths
    from banger.oci.layout import OciImage
    from banger.progress import Reporter

# squashfs with lz4 takes about half of the content.
_LEAST_BYTES = 64 * MIB


class PullPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, decided.

    `replace`: an image of that name may go (nobody uses it); with `again` it does, also when the
    reference still means the same, because its file may be damaged.
    """

    reference: RegistryReference | FileReference
    name: str
    kernel_ref: str
    replace: bool
    again: bool
    reserve_bytes: int
    cache_limit_bytes: int
    install_sshd: bool = False


def plan_pull(
    reference: str,
    *,
    default_registry: str,
    kernel_ref: str,
    name: str | None = None,
    platform: str = "linux/amd64",
    install_sshd: bool = False,
    replace: bool = False,
    again: bool = False,
    reserve_bytes: int = 2 * GIB,
    cache_limit_bytes: int = 10 * GIB,
) -> PullPlan:
    """Decide what a pull does.

    Raises:
        BangerError: bad_request: no reference, no allowed name, another platform.
    """
    check_platform(platform)
    parsed = parse_reference(reference, default_registry)
    if isinstance(parsed, FileReference) and not Path(parsed.path).is_absolute():
        raise BangerError(
            "bad_request",
            f"the path {parsed.path!r} must be absolute",
            hint="banger image pull --help",
        )
    return PullPlan(
        reference=parsed,
        name=name or default_name(parsed),
        kernel_ref=kernel_ref,
        replace=replace,
        again=again,
        install_sshd=install_sshd,
        reserve_bytes=reserve_bytes,
        cache_limit_bytes=cache_limit_bytes,
    )


def find_pulled(paths: Paths, plan: PullPlan) -> ImageRecord | None:
    """The image that an earlier pull of this reference made, whatever its tag means by now."""
    wanted = str(plan.reference)
    found = [
        i
        for i in list_images(paths)
        if i.oci and i.oci.reference == wanted and not is_temporary_image(i.name)
    ]
    return next((i for i in found if i.name == plan.name), found[0] if found else None)


async def pull_image(
    paths: Paths, plan: PullPlan, *, reporter: Reporter, refuse: Refuse = lambda _: None
) -> ImageRecord:
    """Carry a plan out; where the image is stored already and unchanged, just return it.

    Two pulls of one image at once do the work once. Cancelling leaves nothing but whole blobs in
    the cache.

    Raises:
        BangerError: already_exists: the name is another image's, or this reference means another
            image by now; not_found, unauthorized; operation_failed, also with the reasons bad_image
            and disk_full.
    """
    return await run_job(lambda job: _pull(paths, plan, job, refuse), reporter)


def _pull(paths: Paths, plan: PullPlan, job: Job, refuse: Refuse = lambda _: None) -> ImageRecord:
    with lock_image(paths, plan.name, job):
        for kind in ("pull", "delete"):
            remove_abandoned(paths.images, f"{kind}-{plan.name}")
        existing = find_image(paths, plan.name)
        if existing is not None and not _is_same(existing, plan) and not plan.replace:
            raise BangerError(
                "already_exists",
                f"there is an image {plan.name} already, which is not {plan.reference}",
                hint=f"banger image pull {plan.reference} --name NAME",
            )
        job.stage("image", f"looking for {plan.reference}")

        def room_for_download(size: int) -> None:
            require_room(
                paths,
                paths.oci_blobs,
                needed_bytes=size,
                reserve_bytes=plan.reserve_bytes,
                doing=f"fetching {plan.reference}",
            )

        with open_source(
            paths,
            plan.reference,
            job=job,
            require_space=room_for_download,
            cache_limit_bytes=plan.cache_limit_bytes,
        ) as source:
            if existing is not None and existing.oci and _is_same(existing, plan):
                if existing.oci.digest == source.digest and not plan.again:
                    job.stage("image", f"the image {plan.name} is up to date")
                    return _with_sshd(paths, plan, existing)
                if not plan.replace:
                    raise BangerError(
                        "already_exists",
                        f"the image {plan.name} is an older {plan.reference}",
                        hint=f"banger image pull --force {plan.reference}",
                    )
            try:
                return _import(paths, plan, source.fetch(), source.digest, existing, refuse, job)
            except BangerError as e:
                if e.reason != "bad_image" or not source.drop_damaged():
                    raise
                job.warn(f"the cache held damaged layers; they are fetched again ({e})")
            return _import(paths, plan, source.fetch(), source.digest, existing, refuse, job)


def _with_sshd(paths: Paths, plan: PullPlan, existing: ImageRecord) -> ImageRecord:
    """The image that is here, marked for an sshd when that is asked for only now."""
    directory = paths.images / existing.id
    manifest = find_manifest(directory)
    if manifest is None or manifest.install_sshd or not plan.install_sshd:
        return existing
    write_manifest(directory, msgspec.structs.replace(manifest, install_sshd=True))
    return get_image(paths, existing.id)


def _is_same(image: ImageRecord, plan: PullPlan) -> bool:
    return image.oci is not None and image.oci.reference == str(plan.reference)


def _import(
    paths: Paths,
    plan: PullPlan,
    image: OciImage,
    digest: str,
    replaced: ImageRecord | None,
    refuse: Refuse,
    job: Job,
) -> ImageRecord:
    what = str(plan.reference)
    with reading(what):
        config = guest_config(image.config, digest=digest, reference=what)
    job.stage("layers", f"reading {count_layers(len(image.layers))} of {what}")
    with step("pull.layers"):
        index = index_layers(image.layers, what=what, work=job)
    require_room(
        paths,
        paths.images,
        needed_bytes=max(_LEAST_BYTES, index.content_bytes // 2),
        reserve_bytes=plan.reserve_bytes,
        doing=f"pulling the image {what}",
    )
    job.stage("rootfs", f"writing the image {plan.name}")
    merged = Merged()

    def feed(stream: IO[bytes]) -> None:
        nonlocal merged
        merged = write_merged(index, stream, what=what, work=job)

    with files.staging_directory(paths.images, f"pull-{plan.name}") as staging:
        image_id = secrets.token_hex(16)
        new = staging / image_id
        new.mkdir(mode=0o755)
        with step("pull.rootfs"):
            write_squashfs(
                new / ROOTFS, feed, job=job, epoch=index.newest, root_mode=index.root_mode
            )
        job.check()
        job.stage("publish", f"storing the image {plan.name}")
        with step("pull.describe"):
            _describe(new, plan, config, merged)
        return publish_image(paths, new, job=job, replaced=replaced, aside=staging, refuse=refuse)


def _describe(new: Path, plan: PullPlan, config: ImageConfig, merged: Merged) -> None:
    rootfs = new / ROOTFS
    rootfs.chmod(0o444)
    identity = identify(rootfs)
    now = datetime.datetime.now(datetime.UTC)
    write_manifest(
        new,
        ImageManifest(
            name=plan.name,
            distro=merged.distro,
            arch="amd64",
            kernel_ref=plan.kernel_ref,
            rootfs_file=ROOTFS,
            rootfs_sha256=identity.sha256,
            rootfs_bytes=identity.size_bytes,
            rootfs_mtime_ns=identity.mtime_ns,
            install_sshd=plan.install_sshd,
            description=str(plan.reference),
            created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            oci=config,
        ),
    )
