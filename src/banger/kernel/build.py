"""`kernel build`: from sources and a configuration fragment to an entry with everything built in.

A build works in a staging directory of the build cache, which goes with it however it ends, and its
result is kept there by the hash of its inputs: sources, options, compiler. It runs in the caller's
process, which is the daemon: that needs no privilege, and the daemon has the locks, the progress
and the cancellation of everything that becomes an entry. What the programs said is a log beside the
cache, kept only when a build fails.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.config.resources import agent_binary
from banger.disk.artefacts import built_artefacts, inputs_key, remove_abandoned
from banger.disk.background import Job, JobCancelled, run_job
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.kernel import apt
from banger.kernel.base_initrd import build_module_members, write_members
from banger.kernel.build_recipe import KernelRecipe, read_options, read_signing_keys
from banger.kernel.build_tools import require_build_tools
from banger.kernel.built import BOOT_ARCHIVE, RELEASE, publish_built
from banger.kernel.compile import (
    compile_kernel,
    configure,
    read_built_in_indexes,
    read_release,
)
from banger.kernel.entries import MODULES, VMLINUX, find_kernel, lock_kernel, refuse_existing
from banger.kernel.fragment import format_options
from banger.kernel.modules import read_load_order, write_module_indexes, write_modules_squashfs
from banger.kernel.requirements import BOOT_MODULES
from banger.kernel.signature import read_fingerprints, verify_detached
from banger.kernel.sources import (
    Tarball,
    decompress_tarball,
    find_source_package,
    read_signature,
    read_version,
    unpack_source_package,
    unpack_tarball,
)
from banger.names import check_entry_name
from banger.process import get_program, run
from banger.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from banger.api.records import KernelRecord
    from banger.config.paths import Paths
    from banger.progress import Reporter

# Part of the cache key: to be raised when the same inputs would give other files.
BUILDER_VERSION = "1"
# The kernel's version, which for a tarball only its sources tell.
_VERSION = "version"
# Sources 1.7 GB, objects below 1 GB, with the tarball uncompressed beside them 1.6 GB more.
_NEEDED_BYTES = 3 * GIB
_TARBALL_BYTES = 2 * GIB
_MOST_JOBS = 512


class KernelBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built: a recipe, the user's options on top of it, and perhaps a tarball.

    `signing_key`: an exported key of one of the recipe's signers, in place of the shipped ones.
    """

    name: str
    recipe: KernelRecipe
    options: dict[str, str | None]
    added: dict[str, str | None]
    jobs: int
    tarball: Tarball | None = None
    signing_key: bytes | None = None


class _Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where the sources come from: `key` stands for their content, `source` is for the entry."""

    key: tuple[str, ...]
    source: str
    package: apt.KernelPackage | None = None


def plan_build(
    name: str,
    recipe: KernelRecipe,
    *,
    added: dict[str, str | None] | None = None,
    jobs: int | None = None,
    tarball: Tarball | None = None,
    signing_key: bytes | None = None,
) -> KernelBuild:
    """A build that can be done; `added` are options that go on top of the recipe's.

    Raises:
        BangerError: bad_request: a number of jobs that makes no sense, a key without a tarball.
    """
    check_entry_name(name, "kernel")
    if jobs is not None and not 1 <= jobs <= _MOST_JOBS:
        raise _bad(name, f"jobs is {jobs}, must be 1 to {_MOST_JOBS}")
    if signing_key is not None and tarball is None:
        raise _bad(name, "a signing key is for a tarball; Debian's sources are verified by apt")
    return KernelBuild(
        name=name,
        recipe=recipe,
        options={**read_options(recipe), **(added or {})},
        added=added or {},
        jobs=jobs or len(os.sched_getaffinity(0)),
        tarball=tarball,
        signing_key=signing_key,
    )


async def build_kernel(
    paths: Paths,
    build: KernelBuild,
    *,
    reporter: Reporter,
    force: bool = False,
    reserve_bytes: int = 2 * GIB,
) -> KernelRecord:
    """Build a kernel and make it an entry; an earlier build of the same inputs is taken as it is.

    `force` replaces an entry; running VMs keep the files they have open. Cancelling stops the
    compilers and leaves nothing.

    Raises:
        BangerError: already_exists without `force`; not_found: a tool or the sources are missing;
            bad_request: options that the sources do not have; operation_failed, also with the
            reasons disk_full and bad_signature.
    """
    refuse_existing(paths, build.name, force=force)
    return await run_job(lambda job: _build(paths, build, force, reserve_bytes, job), reporter)


def log_path(paths: Paths, name: str) -> Path:
    """Where a failed build leaves what its programs said."""
    return paths.build_cache / "kernels" / f"{name}.log"


def _build(
    paths: Paths, build: KernelBuild, force: bool, reserve_bytes: int, job: Job
) -> KernelRecord:
    recipe, name = build.recipe, build.name
    agent = agent_binary(recipe.arch)
    require_build_tools(name, signature=build.tarball is not None)
    with lock_kernel(paths, name, job):
        if not force and (made_by_peer := find_kernel(paths, name)):
            return made_by_peer
        for kind in ("pull", "delete"):
            remove_abandoned(paths.kernels, f"{kind}-{name}")
        cache = paths.build_cache / "kernels" / name
        sources = _find_sources(build, job)
        key = inputs_key(
            (BUILDER_VERSION, *sources.key, format_options(build.options), *_compiler())
        )

        def make(staging: Path) -> None:
            require_space(
                cache,
                needed_bytes=_NEEDED_BYTES + (_TARBALL_BYTES if build.tarball else 0),
                reserve_bytes=reserve_bytes,
                doing=f"building the kernel {name}",
            )
            _make_artefacts(build, sources, staging, log_path(paths, name), job)

        with built_artefacts(cache, key, make, job=job) as built:
            job.check()
            return publish_built(
                paths,
                name,
                built,
                agent,
                distro=recipe.distro,
                arch=recipe.arch,
                kernel_version=(built / _VERSION).read_text(),
                source=_source_text(sources, build),
            )


def _find_sources(build: KernelBuild, job: Job) -> _Sources:
    recipe = build.recipe
    if build.tarball is None:
        job.stage("kernel", f"looking for the newest {recipe.package}")
        package = find_source_package(recipe, entry=build.name, job=job)
        return _Sources(
            key=(package.name, package.version, package.sha256),
            source=f"build:{package.name}={package.version}",
            package=package,
        )
    job.stage("kernel", f"reading {build.tarball.archive.name}")
    sha256 = files.sha256_file(build.tarball.archive)
    signers = [signer.fingerprint for signer in recipe.signers]
    return _Sources(
        key=(sha256, *signers), source=f"build:{build.tarball.archive.name} sha256 {sha256}"
    )


def _source_text(sources: _Sources, build: KernelBuild) -> str:
    if not build.added:
        return sources.source
    return f"{sources.source}, {len(build.added)} options of a fragment on top"


def _compiler() -> tuple[str, str]:
    """Versions of what makes the machine code: others may make other code of the same sources."""
    first = []
    for program in ("gcc", "ld"):
        path = get_program(program, package="gcc binutils")
        first.append(run([path, "--version"]).stdout.decode(errors="replace").partition("\n")[0])
    return first[0], first[1]


def _make_artefacts(
    build: KernelBuild, sources: _Sources, staging: Path, log: Path, job: Job
) -> None:
    name = build.name
    log.unlink(missing_ok=True)
    try:
        with files.staging_directory(staging, "scratch") as scratch:
            tree = scratch / "linux"
            version = _fetch(build, sources, scratch, tree, job)
            job.stage("kernel", f"configuring {name}", f"{len(build.options)} options")
            configure(tree, build.options, name=name, log=log, job=job)
            job.stage("kernel", f"compiling {name}", f"{build.jobs} at a time")
            compile_kernel(tree, staging / VMLINUX, name=name, jobs=build.jobs, log=log, job=job)
            release = read_release(tree)
            _write_indexes(tree, release, scratch, staging / MODULES, job)
        write_members(staging / BOOT_ARCHIVE, build_module_members({}))
        (staging / RELEASE).write_text(release)
        (staging / _VERSION).write_text(version)
    except JobCancelled:
        # A cancelled build leaves nothing; of a failed one the log stays.
        log.unlink(missing_ok=True)
        raise
    log.unlink(missing_ok=True)


def _fetch(build: KernelBuild, sources: _Sources, scratch: Path, tree: Path, job: Job) -> str:
    """Put the sources into `tree`; return their version."""
    if sources.package is not None:
        package = sources.package
        what = f"{package.name} {package.version}"
        with files.staging_directory(scratch, "download") as downloads:
            job.stage("kernel", f"downloading {what}", f"{package.size_bytes // 1_000_000} MB")
            deb = apt.download(package, downloads, job=job)
            job.stage("kernel", f"unpacking {what}")
            unpack_source_package(deb, tree, job=job)
        version = package.version
    else:
        assert build.tarball is not None
        what = build.tarball.archive.name
        _unpack_verified(build, build.tarball, sources, scratch, tree, job)
        version = read_version(tree, what=what)
    if not (found := read_version(tree, what=what)).startswith(f"{build.recipe.series}."):
        raise BangerError(
            "bad_request",
            f"building the kernel {build.name}: {what} holds Linux {found}, not a "
            f"{build.recipe.series}",
            hint="banger kernel build --help",
        )
    return version


def _unpack_verified(
    build: KernelBuild, tarball: Tarball, sources: _Sources, scratch: Path, tree: Path, job: Job
) -> None:
    what = tarball.archive.name
    pinned = frozenset(signer.fingerprint for signer in build.recipe.signers)
    with files.staging_directory(scratch, "signed") as place:
        if build.signing_key is None:
            keys = read_signing_keys(build.recipe)
        else:
            keys = (build.signing_key,)
            given = read_fingerprints(build.signing_key, place, job)
            if foreign := [f for f in given if f not in pinned]:
                raise _bad(
                    build.name,
                    f"the signing key {foreign[0]} is none of those that recipe "
                    f"{build.recipe.name} names",
                )
        job.stage("kernel", f"verifying {what}", "decompressing it for its signature")
        archive, signature = place / "linux.tar", place / "linux.tar.sign"
        read_signature(tarball, signature)
        decompress_tarball(tarball, archive, job=job)
        signed = verify_detached(
            archive, signature, keys, pinned, what=what, scratch=place, job=job
        )
        signer = next(s.name for s in build.recipe.signers if s.fingerprint == signed.fingerprint)
        job.stage("kernel", f"unpacking {what}", f"signed by {signer}")
        unpack_tarball(archive, tree, what=what, job=job)


def _write_indexes(tree: Path, release: str, scratch: Path, target: Path, job: Job) -> None:
    """modules.sqfs without modules: what the guest's modprobe reads to know all is built in."""
    base = scratch / "modules"
    directory = base / "lib/modules" / release
    directory.mkdir(parents=True)
    for index, content in read_built_in_indexes(tree).items():
        (directory / index).write_bytes(content)
    write_module_indexes(base, release, job=job)
    # Whoever pulls it as a bundle reads there that nothing has to be loaded for a boot.
    if loaded := read_load_order(directory, BOOT_MODULES):
        raise BangerError(
            "operation_failed", f"the kernel {release} has modules, such as {loaded[0]}"
        )
    write_modules_squashfs(directory, target, job=job)


def _bad(name: str, problem: str) -> BangerError:
    return BangerError(
        "bad_request",
        f"building the kernel {name}: {problem}",
        hint="banger kernel build --help",
    )
