"""Building images from recipes: mmdebstrap → filter → sqfstar, one pipeline without temporary tar.

A finished root filesystem is kept in the build cache under the hash of its recipe and linked into
the state directory. A build that fails, is cancelled or killed leaves no image and no part of one.
"""

from __future__ import annotations

import datetime
import secrets
import subprocess
import tarfile
import tempfile
import time
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.decoding import decode_json
from banger.disk.artefacts import built_artefacts, find_artefacts, inputs_key, remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.disk.space import require_space
from banger.disk.squashfs import write_squashfs
from banger.errors import BangerError
from banger.image.debian import (
    build_mmdebstrap_argv,
    explain_failure,
    find_mmdebstrap,
    is_root,
    read_apt_sources,
)
from banger.image.downloads import DownloadMissing, fetch_npm
from banger.image.entries import (
    ROOTFS,
    ImageManifest,
    Refuse,
    find_image,
    is_another,
    lock_image,
    publish_image,
    write_manifest,
)
from banger.image.features import Extras, assemble
from banger.image.recipe import LoadedRecipe, load_recipe
from banger.image.register import refuse_existing
from banger.image.rootfs import Addition, RootStats, filter_root
from banger.names import check_entry_name
from banger.process import ProcessFailed, get_program
from banger.units import GIB, MIB

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import IO

    from banger.api.records import ImageRecord
    from banger.config.paths import Paths
    from banger.progress import Reporter

# Part of the cache key: to be raised when the same recipe would give another root filesystem.
BUILDER_VERSION = "1"
NO_EXTRAS = Extras()
_BUILD = "build.json"
_NEEDED_BYTES = 3 * GIB
_REPORT_EVERY_BYTES = 8 * MIB

# What mmdebstrap says → what the user reads.
_PHASES = {
    "running apt-get update": "reading package lists",
    "downloading packages": "downloading packages",
    "extracting archives": "unpacking the base system",
    "installing essential packages": "installing the base system",
    "installing remaining packages": "installing packages",
    "running --customize-hook": "running the recipe's scripts",
    "cleaning package lists": "cleaning up",
    "creating tarball": "writing the image",
}


class _BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """`build.json`: what a build found out, kept with the root filesystem in the cache."""

    optional_missing: tuple[str, ...]


async def build_image(
    paths: Paths,
    recipe: LoadedRecipe,
    *,
    name: str,
    reporter: Reporter,
    extras: Extras = NO_EXTRAS,
    kernel_ref: str | None = None,
    refresh: bool = False,
    reserve_bytes: int = 2 * GIB,
    replaced: ImageRecord | None = None,
    refuse: Refuse = lambda _: None,
) -> ImageRecord:
    """Build the image of a bootstrapped recipe and store it as `name`.

    An earlier build of the same recipe is taken from the cache; `refresh` builds anew, with the
    packages of today. `replaced` is an image of that name that may go, which it does when the new
    one is whole. Cancelling ends the host programs and leaves nothing. When another caller is just
    building `name`, its image is the result.

    Raises:
        BangerError: already_exists; not_found: a host program is missing; operation_failed, also
            with reason disk_full; what `refuse` raises of an image that is to be replaced.
    """
    check_entry_name(name, "image")
    if is_another(find_image(paths, name), replaced):
        refuse_existing(paths, name)
    whole = _whole(recipe, extras, kernel_ref)
    return await run_job(
        lambda job: _build(paths, whole, name, refresh, reserve_bytes, job, replaced, refuse),
        reporter,
    )


async def ensure_image(
    paths: Paths, name: str, *, reporter: Reporter, reserve_bytes: int = 2 * GIB
) -> ImageRecord:
    """The image of this name or id, built from the shipped recipe of that name when there is none.

    Raises:
        BangerError: as `build_image`; not_found: neither image nor recipe.
    """
    if record := find_image(paths, name):
        return record
    recipe = _whole(load_recipe(name), NO_EXTRAS)
    return await run_job(
        lambda job: _build(paths, recipe, name, False, reserve_bytes, job), reporter
    )


async def build_artefact(
    paths: Paths, recipe: LoadedRecipe, *, reporter: Reporter, extras: Extras = NO_EXTRAS
) -> None:
    """Build a recipe's root filesystem into the cache only; nothing when it is there.

    Who may start the programs that this needs is not always who publishes the image.

    Raises:
        BangerError: as `build_image`.
    """

    whole = _whole(recipe, extras)

    def work(job: Job) -> None:
        with _artefact(paths, whole, False, job):
            return

    await run_job(work, reporter)


def is_built(paths: Paths, recipe: LoadedRecipe, extras: Extras = NO_EXTRAS) -> bool:
    """Whether the cache holds this very recipe's root filesystem, so that publishing is enough."""
    whole = _whole(recipe, extras)
    return find_artefacts(_cache_of(paths, whole), _key(whole)) is not None


def _whole(loaded: LoadedRecipe, extras: Extras, kernel_ref: str | None = None) -> LoadedRecipe:
    """The recipe with its features and what was asked for. Raises BangerError, bad_request."""
    if not loaded.recipe.bootstrapped:
        raise BangerError(
            "bad_request",
            f"the recipe {loaded.recipe.name} is built in a machine, not on the host",
            hint=f"banger image build --name NAME --recipe {loaded.recipe.name}",
        )
    whole = assemble(loaded, extras, "apt-get")
    if kernel_ref is None:
        return whole
    recipe = msgspec.structs.replace(whole.recipe, kernel_ref=kernel_ref)
    return msgspec.structs.replace(whole, recipe=recipe)


def _build(
    paths: Paths,
    loaded: LoadedRecipe,
    name: str,
    refresh: bool,
    reserve_bytes: int,
    job: Job,
    replaced: ImageRecord | None = None,
    refuse: Refuse = lambda _: None,
) -> ImageRecord:
    with lock_image(paths, name, job):
        existing = find_image(paths, name)
        if is_another(existing, replaced):
            return existing  # made by a peer
        require_space(
            paths.images,
            needed_bytes=_NEEDED_BYTES,
            reserve_bytes=reserve_bytes,
            doing=f"building the image {name}",
        )
        for kind in ("build", "delete"):
            remove_abandoned(paths.images, f"{kind}-{name}")
        with _artefact(paths, loaded, refresh, job) as built:
            job.check()
            return _publish(paths, loaded, name, built, job, existing, refuse)


def _artefact(
    paths: Paths, loaded: LoadedRecipe, refresh: bool, job: Job
) -> AbstractContextManager[Path]:
    return built_artefacts(
        _cache_of(paths, loaded),
        _key(loaded),
        lambda staging: _build_rootfs(loaded, staging, job),
        job=job,
        refresh=refresh,
    )


def _cache_of(paths: Paths, loaded: LoadedRecipe) -> Path:
    return paths.build_cache / "images" / loaded.recipe.name


def _key(loaded: LoadedRecipe) -> str:
    sources = (part for item in sorted(loaded.sources.items()) for part in item)
    return inputs_key((BUILDER_VERSION, loaded.text, *sources))


def _build_rootfs(loaded: LoadedRecipe, staging: Path, job: Job) -> None:
    recipe = loaded.recipe
    assert recipe.suite is not None
    mmdebstrap = find_mmdebstrap()
    get_program("sqfstar", package="squashfs-tools")
    job.stage("rootfs", f"building {recipe.name}", "looking at apt's sources")
    sources = read_apt_sources(recipe.suite, job)
    if not sources:
        job.warn(
            f"no Debian {recipe.suite} in this host's apt sources; mmdebstrap's default is used"
        )
    argv = build_mmdebstrap_argv(loaded, sources, mmdebstrap=mmdebstrap, root=is_root())
    with files.staging_directory(staging, "downloads") as downloads:
        additions, missing = collect_additions(loaded, downloads, job)
        try:
            _run_pipeline(argv, staging / ROOTFS, additions, recipe.name, job)
        except ProcessFailed as e:
            raise explain_failure(e, recipe.suite) from e
    (staging / _BUILD).write_bytes(msgspec.json.encode(_BuildResult(optional_missing=missing)))


def collect_additions(
    loaded: LoadedRecipe, downloads: Path, job: Job
) -> tuple[dict[str, Addition], tuple[str, ...]]:
    """What the recipe adds, by path, and the names of the optional downloads that are missing."""
    additions = {}
    missing = []
    for file in loaded.recipe.files:
        content = (file.content or "").encode()
        if file.source is not None:
            content = loaded.sources[file.source]
        additions[file.path.lstrip("/")] = Addition(mode=int(file.mode, 8), content=content)
    for download in loaded.recipe.downloads:
        job.stage("rootfs", f"building {loaded.recipe.name}", f"fetching {download.name}")
        try:
            fetched = downloads / secrets.token_hex(4)
            fetch_npm(download, fetched, job=job)
        except DownloadMissing as e:
            if not download.optional:
                raise BangerError(
                    "operation_failed",
                    f"fetching {download.name} for the image {loaded.recipe.name}: {e}",
                    hint="sudo apt-get install npm",
                ) from e
            job.warn(f"{download.name} is left out of the image: {e}")
            missing.append(download.name)
            continue
        additions[download.path.lstrip("/")] = Addition(mode=int(download.mode, 8), content=fetched)
    return additions, tuple(missing)


def _run_pipeline(
    argv: list[str], target: Path, additions: dict[str, Addition], name: str, job: Job
) -> None:
    stats = RootStats()
    reported = 0
    # File times are compared with a clock that is not ours to steer: one second of slack.
    built_after = int(time.time()) - 1

    def on_line(line: str) -> None:
        said = line.removeprefix("I: ")
        for beginning, label in _PHASES.items():
            if line != said and said.startswith(beginning):
                job.stage("rootfs", f"building {name}", label)

    def check() -> None:
        nonlocal reported
        job.check()
        if stats.content_bytes - reported >= _REPORT_EVERY_BYTES:
            reported = stats.content_bytes
            job.advance(reported, None, "writing the image")

    with job.program(argv, stdout=subprocess.PIPE, on_line=on_line) as debstrap:
        assert debstrap.stdout
        tar = debstrap.stdout

        def feed(stream: IO[bytes]) -> None:
            with tempfile.TemporaryFile(dir=target.parent) as aside:
                filter_root(
                    tar, stream, additions,
                    stats=stats, check=check, aside=aside, built_after=built_after,
                )  # fmt: skip
            _drain(tar)  # the padding behind the end mark, or its writer dies of SIGPIPE

        try:
            # No epoch: it would change the times of package files, which their compiled Python
            # files name. The filter has fixed the times of what this build made.
            write_squashfs(target, feed, job=job, epoch=None)
        except (tarfile.TarError, ValueError) as e:
            # Most often a root that ends early, and then mmdebstrap's own words say why: they are
            # raised when the block is left.
            _drain(tar)
            if debstrap.wait() == 0:
                raise BangerError(
                    "operation_failed", f"writing the root filesystem of {name}: {e}"
                ) from e
    job.advance(stats.content_bytes, stats.content_bytes, f"{stats.members} files")


def _drain(stream: IO[bytes]) -> None:
    while stream.read(1 << 18):
        pass


def _publish(
    paths: Paths,
    loaded: LoadedRecipe,
    name: str,
    built: Path,
    job: Job,
    replaced: ImageRecord | None,
    refuse: Refuse,
) -> ImageRecord:
    recipe = loaded.recipe
    assert recipe.kernel_ref is not None
    job.stage("publish", f"storing the image {name}")
    result = decode_json((built / _BUILD).read_bytes(), type=_BuildResult)
    if result.optional_missing:
        job.warn(f"the image {name} lacks what was optional: {', '.join(result.optional_missing)}")
    image_id = secrets.token_hex(16)
    with files.staging_directory(paths.images, f"build-{name}") as staging:
        new = staging / image_id
        new.mkdir(mode=0o755)
        files.link_or_copy(built / ROOTFS, new / ROOTFS)
        identity = identify(new / ROOTFS)
        now = datetime.datetime.now(datetime.UTC)
        write_manifest(
            new,
            ImageManifest(
                name=name,
                distro=recipe.distro,
                arch=recipe.arch[0],
                kernel_ref=recipe.kernel_ref,
                rootfs_file=ROOTFS,
                rootfs_sha256=identity.sha256,
                rootfs_bytes=identity.size_bytes,
                rootfs_mtime_ns=identity.mtime_ns,
                features=recipe.features,
                recipe=recipe.name,
                optional_missing=result.optional_missing,
                description=recipe.description,
                created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            ),
        )
        return publish_image(paths, new, job=job, replaced=replaced, aside=staging, refuse=refuse)
