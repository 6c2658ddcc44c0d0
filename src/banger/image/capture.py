"""An image of a running machine: its system as one stream, checked, straight into squashfs.

The machine belongs to a build and is thrown away afterwards. What belongs to a machine and not to
an image is left out: by the guest's agent, to whom the list is sent, and once more here, since a
guest is not believed. The image appears by one rename; a failure leaves nothing.
"""

from __future__ import annotations

import datetime
import re
import secrets
from typing import IO, TYPE_CHECKING

import msgspec

from banger import files
from banger.api.records import ImageConfig, ImageRecord
from banger.disk.artefacts import remove_abandoned
from banger.disk.identity import identify
from banger.disk.space import require_space
from banger.disk.squashfs import write_squashfs
from banger.image.entries import (
    ROOTFS,
    ImageManifest,
    Refuse,
    find_image,
    find_manifest,
    is_another,
    lock_image,
    publish_image,
    write_manifest,
)
from banger.image.register import refuse_existing
from banger.oci.compression import ceiling_bytes
from banger.oci.errors import reading
from banger.oci.live import LiveTar, Passed
from banger.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from banger.config.paths import Paths
    from banger.disk.background import Job
    from banger.oci.live import Fate
    from banger.rpc.trees import GuestFiles

# As path.Match has them in the agent: "*" ends at a slash, and what is below goes along.
EXCLUDED = (
    # filled anew at each boot
    "proc/*", "sys/*", "dev/*", "run/*", "tmp/*", "var/tmp/*",
    # what the agent writes into every machine
    "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/fstab", "etc/ssh/ssh_host_*",
    "etc/ssh/sshd_config.d/00-banger.conf", "var/lib/banger", "var/log/banger-first-boot.log",
    # one machine's own
    "etc/.pwd.lock", "var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/log/journal/*",
    "root/lost+found", "root/.ash_history", "root/.bash_history", "root/.wget-hsts",
    # what package managers fetch again
    "var/cache/apk/*", "var/cache/apt/*", "var/lib/apt/lists/*", "var/cache/dnf/*",
    "var/cache/libdnf5/*", "var/cache/pacman/pkg/*", "var/cache/xbps/*", "var/cache/zypp/*",
)  # fmt: skip
ENTERED = ("root",)
"""The mount points that belong to an image: the work disk."""

_EXCLUDED = re.compile(
    "|".join(re.escape(p).replace(r"\*", r"[^/]*") for p in EXCLUDED).encode(), re.DOTALL
)
# Present and empty: the owner and mode of a log count, and an empty id is made at the first boot.
_EMPTIED = re.compile(rb"etc/machine-id|var/log/.*", re.DOTALL)
_SETTLE_S = 30.0
_LEAST_BYTES = 64 * MIB
_CHECK_EVERY_BYTES = 64 * MIB


class NewImage(msgspec.Struct, frozen=True, kw_only=True):
    """What the image will be called, and what is known of it before it is there.

    `disk_bytes` is the room that the machine's disks have together.
    """

    name: str
    base: ImageRecord
    distro: str
    kernel_ref: str
    features: tuple[str, ...]
    recipe: str | None
    optional_missing: tuple[str, ...]
    description: str
    disk_bytes: int
    replaced: ImageRecord | None
    reserve_bytes: int


def decide(path: bytes) -> Fate:
    """What becomes of a path (no leading slash) of a machine's system."""
    if _EXCLUDED.fullmatch(path):
        return "drop"
    return "empty" if _EMPTIED.fullmatch(path) else "keep"


def capture_image(
    paths: Paths,
    guest: GuestFiles,
    new: NewImage,
    job: Job,
    *,
    refuse: Refuse = lambda _: None,
) -> ImageRecord:
    """Stop the guest's services and make an image of its system.

    Raises:
        BangerError: already_exists; operation_failed, also with the reasons bad_image (what came is
            no system that can be one), disk_full and connection_lost; what `refuse` raises of an
            image that is to be replaced.
    """
    with lock_image(paths, new.name, job):
        existing = find_image(paths, new.name)
        if is_another(existing, new.replaced):
            refuse_existing(paths, new.name)
        for kind in ("build", "delete"):
            remove_abandoned(paths.images, f"{kind}-{new.name}")
        _require_space(paths, new, _LEAST_BYTES)
        job.stage("capture", f"stopping the services of the machine for {new.name}")
        with files.staging_directory(paths.images, f"build-{new.name}") as staging:
            directory = staging / secrets.token_hex(16)
            directory.mkdir(mode=0o755)

            def receive(chunks: Iterator[bytes]) -> None:
                _write(paths, directory, new, chunks, job)

            guest.capture(EXCLUDED, ENTERED, receive, grace_s=_SETTLE_S)
            job.check()
            job.stage("publish", f"storing the image {new.name}")
            _describe(paths, directory, new)
            return publish_image(
                paths, directory, job=job, replaced=existing, aside=staging, refuse=refuse
            )


def _write(paths: Paths, directory: Path, new: NewImage, chunks: Iterator[bytes], job: Job) -> None:
    seen = 0

    def watched() -> Iterator[bytes]:
        """The chunks, with a look at the disk now and then: nobody knows how many will come."""
        nonlocal seen
        for chunk in chunks:
            before, seen = seen, seen + len(chunk)
            if seen // _CHECK_EVERY_BYTES != before // _CHECK_EVERY_BYTES:
                _require_space(paths, new, 0)
            yield chunk

    most = ceiling_bytes(new.base.rootfs_bytes) + new.disk_bytes
    what = f"the system of the machine for {new.name}"
    tar = LiveTar(watched(), decide=decide, most_bytes=most)
    passed = Passed()

    def feed(stream: IO[bytes]) -> None:
        nonlocal passed
        with reading(what):
            passed = tar.copy(stream, work=job)

    with reading(what):
        root_mode = tar.root_mode()
    job.stage("rootfs", f"writing the image {new.name}")
    # No epoch: the files of packages keep their times, as in an image that was bootstrapped.
    write_squashfs(directory / ROOTFS, feed, job=job, epoch=None, root_mode=root_mode)
    job.advance(passed.content_bytes, passed.content_bytes, f"{passed.members} files")


def _describe(paths: Paths, directory: Path, new: NewImage) -> None:
    rootfs = directory / ROOTFS
    rootfs.chmod(0o444)
    identity = identify(rootfs)
    base = find_manifest(paths.images / new.base.id)
    now = datetime.datetime.now(datetime.UTC)
    write_manifest(
        directory,
        ImageManifest(
            name=new.name,
            distro=new.distro,
            arch=new.base.arch,
            kernel_ref=new.kernel_ref,
            rootfs_file=ROOTFS,
            rootfs_sha256=identity.sha256,
            rootfs_bytes=identity.size_bytes,
            rootfs_mtime_ns=identity.mtime_ns,
            features=tuple(dict.fromkeys((*new.base.features, *new.features))),
            recipe=new.recipe,
            optional_missing=tuple(
                dict.fromkeys((*new.base.optional_missing, *new.optional_missing))
            ),
            install_sshd=base is not None and base.install_sshd,
            description=new.description,
            created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            oci=_inherited(new.base.oci),
        ),
    )


def _inherited(config: ImageConfig | None) -> ImageConfig | None:
    """How the base says that it is run. What it was pulled as is not this image's."""
    if config is None:
        return None
    kept = msgspec.structs.replace(config, digest="", reference="")
    return None if kept == ImageConfig() else kept


def _require_space(paths: Paths, new: NewImage, needed: int) -> None:
    require_space(
        paths.images,
        needed_bytes=needed,
        reserve_bytes=new.reserve_bytes,
        doing=f"building the image {new.name}",
    )
