"""Kernels out of files of the user's: `kernel import`, and the kernel of a registered image.

The files are copied, unpacked and packed into an entry; the user's stay as they are. No link is
followed out of the directory that was named.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.config.resources import agent_binary
from banger.disk.artefacts import remove_abandoned
from banger.disk.background import Job, run_job
from banger.disk.identity import identify
from banger.disk.space import require_space
from banger.errors import BangerError
from banger.kernel.base_initrd import (
    build_module_members,
    read_module_members,
    write_base_initrd,
)
from banger.kernel.compression import decompress, find_compression
from banger.kernel.entries import (
    INITRD,
    MODULES,
    VMLINUX,
    KernelManifest,
    find_kernel,
    get_kernel,
    lock_kernel,
    now_text,
    publish_entry,
    write_manifest,
)
from banger.kernel.modules import read_load_order, write_module_indexes, write_modules_squashfs
from banger.kernel.requirements import (
    BOOT_MODULES,
    find_missing_boot_options,
    find_missing_container_options,
    find_missing_options,
)
from banger.kernel.vmlinux import extract_vmlinux
from banger.names import check_entry_name
from banger.units import MIB

if TYPE_CHECKING:
    from banger.api.records import KernelRecord
    from banger.config.paths import Paths
    from banger.disk.cpio import Member
    from banger.progress import Reporter

_IMAGE_LIMIT_BYTES = 512 * MIB
_MODULE_LIMIT_BYTES = 256 * MIB
_TREE_LIMIT_BYTES = 4096 * MIB
_CONFIG_LIMIT_BYTES = 4 * MIB
_NEEDED_BYTES = 600 * MIB
_HINT = "banger kernel import --help"
# init/version.c: the banner that a kernel begins its log with.
_BANNER = re.compile(rb"Linux version ([0-9][A-Za-z0-9._+~-]{0,127}) ")
# kernel/configs.c: the configuration between these marks, with CONFIG_IKCONFIG.
_CONFIG_BEGIN, _CONFIG_END = b"IKCFG_ST", b"IKCFG_ED"
# Links to the sources that modules were built from; they lead out of every package.
_SOURCE_LINKS = frozenset({"build", "source"})


class GivenKernel(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes an entry. `root`: no link may lead out of it. `modules` is a directory, and no
    link in it leads out of that, or of `root`.

    `initrd` is a base initrd that banger made; it and `modules` exclude each other.
    """

    name: str
    distro: str
    source: str
    root: Path | None
    kernel: Path
    modules: Path | None = None
    initrd: Path | None = None
    config: Path | None = None


def plan_import(name: str, directory: Path, distro: str) -> GivenKernel:
    """What is in a directory: `vmlinux` or `vmlinuz`, `modules/`, and `config` or `.config`.

    Raises:
        BangerError: bad_request: no kernel there, or a link that leads out of it.
    """
    check_entry_name(name, "kernel")
    if not directory.is_absolute() or not directory.is_dir():
        raise _refused(directory, "it is no directory")
    found = {
        file: path
        for file in ("vmlinux", "vmlinuz", "modules", "config", ".config")
        if os.path.lexists(path := directory / file)
    }
    kernel = found.get("vmlinux") or found.get("vmlinuz")
    if kernel is None:
        raise _refused(directory, "it holds neither vmlinux nor vmlinuz")
    return GivenKernel(
        name=name,
        distro=distro,
        source=f"import:{directory}",
        root=directory,
        kernel=kernel,
        modules=found.get("modules"),
        config=found.get("config") or found.get(".config"),
    )


async def make_kernel(
    paths: Paths,
    given: GivenKernel,
    *,
    force: bool,
    reserve_bytes: int,
    reporter: Reporter,
) -> KernelRecord:
    """Make an entry of these files.

    Raises:
        BangerError: already_exists without `force`; bad_request: what is given is no kernel for
            guests, its message says what it lacks; operation_failed, also with reason disk_full.
    """
    return await run_job(lambda job: _make(paths, given, force, reserve_bytes, job), reporter)


def _make(
    paths: Paths, given: GivenKernel, force: bool, reserve_bytes: int, job: Job
) -> KernelRecord:
    name = given.name
    agent = agent_binary("amd64")
    with lock_kernel(paths, name, job):
        if not force and find_kernel(paths, name):
            raise BangerError(
                "already_exists",
                f"there is a kernel {name} already",
                hint=f"banger kernel rm {name}",
            )
        require_space(
            paths.kernels,
            needed_bytes=_NEEDED_BYTES,
            reserve_bytes=reserve_bytes,
            doing=f"importing the kernel {name}",
        )
        for kind in ("import", "delete"):
            remove_abandoned(paths.kernels, f"{kind}-{name}")
        with files.staging_directory(paths.kernels, f"import-{name}") as staging:
            new = staging / "entry"
            new.mkdir(mode=0o755)
            job.stage("kernel", f"reading {given.kernel}")
            try:
                vmlinux = extract_vmlinux(_read(given.root, given.kernel, _IMAGE_LIMIT_BYTES))
            except (ValueError, OSError) as e:
                raise _refused(given.kernel, _words(e)) from e
            release = _release_of(vmlinux, given)
            _check_config(vmlinux, given, job)
            (new / VMLINUX).write_bytes(vmlinux)
            modules = _make_modules(given, release, new / MODULES, staging, job)
            write_base_initrd(new / INITRD, agent=agent, modules=modules)
            names = (VMLINUX, INITRD, MODULES)
            for file in names:
                (new / file).chmod(0o444)
            write_manifest(
                new,
                KernelManifest(
                    name=name,
                    distro=given.distro,
                    arch="amd64",
                    kernel_version=release,
                    release=release,
                    source=given.source,
                    agent_version=files.sha256_file(agent),
                    imported_at=now_text(),
                    files={file: identify(new / file) for file in names},
                ),
            )
            job.check()
            publish_entry(paths, name, new)
    return get_kernel(paths, name)


def _release_of(vmlinux: bytes, given: GivenKernel) -> str:
    m = _BANNER.search(vmlinux)
    if m is None:
        raise _refused(given.kernel, "it holds no Linux banner with a version")
    return m[1].decode()


def _check_config(vmlinux: bytes, given: GivenKernel, job: Job) -> None:
    """The kernel's configuration, where there is one, against what a guest needs."""
    config = _find_config(vmlinux, given)
    if config is None:
        job.warn(
            f"the kernel {given.name} comes without its configuration, so whether it has what a "
            "guest needs shows at the first start; a file `config` beside it would tell"
        )
        return
    missing = find_missing_options(config)
    if given.modules is None and given.initrd is None:
        missing += find_missing_boot_options(config)
    if missing:
        raise _refused(given.kernel, f"it cannot boot a guest: it lacks {', '.join(missing)}")
    if lacking := find_missing_container_options(config):
        job.warn(
            f"containers inside a guest of the kernel {given.name} will miss {', '.join(lacking)}"
        )


def _find_config(vmlinux: bytes, given: GivenKernel) -> str | None:
    try:
        if given.config is not None:
            return _read(given.root, given.config, _CONFIG_LIMIT_BYTES).decode("utf-8", "replace")
        start = vmlinux.find(_CONFIG_BEGIN)
        end = vmlinux.find(_CONFIG_END, start)
        if start < 0 or end < 0:
            return None
        packed = vmlinux[start + len(_CONFIG_BEGIN) : end]
        return decompress(packed, limit_bytes=_CONFIG_LIMIT_BYTES).decode("utf-8", "replace")
    except (ValueError, OSError, zlib.error, gzip.BadGzipFile) as e:
        raise _refused(given.config or given.kernel, f"its configuration: {_words(e)}") from e


def _make_modules(
    given: GivenKernel, release: str, target: Path, staging: Path, job: Job
) -> tuple[Member, ...]:
    """Write modules.sqfs; return the initrd's members."""
    tree = staging / "tree"
    directory = tree / "lib/modules" / release
    directory.mkdir(parents=True)
    if given.modules is not None:
        job.stage("kernel", f"reading {given.modules}")
        try:
            source = _find_release(given.modules, release)
            _copy_modules(given.root or given.modules, source, directory, job)
        except (ValueError, OSError) as e:
            raise _refused(given.modules, _words(e)) from e
    for index in ("modules.builtin", "modules.order"):
        (directory / index).touch()
    write_module_indexes(tree, release, job=job)
    job.stage("kernel", "writing modules.sqfs")
    write_modules_squashfs(directory, target, job=job)
    if given.initrd is not None:
        try:
            return tuple(read_module_members(given.initrd))
        except (ValueError, OSError) as e:
            raise BangerError(
                "bad_request",
                f"{given.initrd} is no base initrd made by banger ({_words(e)}); "
                "of another one name the modules: --modules DIR",
                hint="banger image register --help",
            ) from e
    if given.modules is None:
        return build_module_members({})
    order = read_load_order(directory, BOOT_MODULES)
    return build_module_members({path: (directory / path).read_bytes() for path in order})


def _find_release(modules: Path, release: str) -> Path:
    """The directory of this release: `modules` itself, or where a package or an install puts it."""
    for candidate in (
        modules / "lib/modules" / release,
        modules / "usr/lib/modules" / release,
        modules / release,
        modules,
    ):
        if (candidate / "kernel").is_dir() or (candidate / "modules.builtin").is_file():
            return candidate
    raise ValueError(f"it holds no modules of {release}")


def _copy_modules(root: Path, source: Path, target: Path, job: Job) -> None:
    total = 0

    def fail(e: OSError) -> None:
        raise e

    for place, directories, names in os.walk(source, onerror=fail):
        job.check()
        here = Path(place)
        there = target / here.relative_to(source)
        there.mkdir(exist_ok=True)
        for name in directories:
            if (here / name).is_symlink() and name not in _SOURCE_LINKS:
                raise ValueError(f"{here / name} is a link to a directory")
        for name in names:
            path = here / name
            if name in _SOURCE_LINKS and path.is_symlink():
                continue
            content = _read(root, path, _MODULE_LIMIT_BYTES)
            total += len(content)
            if total > _TREE_LIMIT_BYTES:
                raise ValueError("it is larger than any kernel's modules")
            # The agent loads plain modules before there is a modprobe.
            if re.search(r"\.ko\.(xz|zst|gz)$", name) and find_compression(content):
                name = name.rpartition(".")[0]
                content = decompress(content, limit_bytes=_MODULE_LIMIT_BYTES)
            (there / name).write_bytes(content)


def _read(root: Path | None, path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes.

    Raises:
        ValueError: it is none, too large, or a link out of `root`. OSError.
    """
    real = path.resolve(strict=True)
    if root is not None and not real.is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link that leads out of {root}")
    # Opened by its real path, without following another link that came meanwhile.
    fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as f:
        if not real.is_file():
            raise ValueError(f"{path} is no regular file")
        content = f.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is larger than {most >> 20} MiB")
    return content


def _words(e: Exception) -> str:
    if isinstance(e, OSError):
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e)
    return str(e)


def _refused(what: Path, problem: str) -> BangerError:
    return BangerError("bad_request", f"importing {what}: {problem}", hint=_HINT)
