"""Kernel entries: `<state>/kernels/<name>/` with manifest.json, which is the truth about them.

An entry appears and disappears by a rename; its files are read-only and shared by all VMs. There
is no database row.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from banger import files
from banger.api.records import KernelRecord
from banger.decoding import MALFORMED, decode_json
from banger.disk.background import Job
from banger.disk.identity import FileChanged, FileIdentity, check_identity
from banger.errors import BangerError
from banger.faults import step
from banger.names import check_entry_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from banger.config.paths import Paths

VMLINUX, INITRD, MODULES = "vmlinux", "initrd.img", "modules.sqfs"
MANIFEST = "manifest.json"


class KernelManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json` of a kernel entry (spec 5.3). `agent_version` is the agent's sha256."""

    schema: Literal[1] = 1
    name: str
    distro: str
    arch: str
    kernel_version: str
    release: str
    source: str
    agent_version: str
    imported_at: str
    files: dict[str, FileIdentity]


def find_kernel(paths: Paths, name: str) -> KernelRecord | None:
    """The entry of this name, or None.

    Raises:
        BangerError: the name is not allowed, or the entry's manifest cannot be read: only a missing
            entry is no entry.
    """
    check_entry_name(name, "kernel")
    directory = paths.kernels / name
    manifest = find_manifest(directory)
    return _record(directory, manifest) if manifest else None


def get_kernel(paths: Paths, name: str) -> KernelRecord:
    """As `find_kernel`, but a missing entry is not_found."""
    record = find_kernel(paths, name)
    if record is None:
        raise BangerError(
            "not_found", f"there is no kernel {name!r} here", hint=f"banger kernel pull {name}"
        )
    return record


def refuse_existing(paths: Paths, name: str, *, force: bool) -> None:
    """Raises BangerError already_exists where there is an entry of this name, without `force`."""
    if not force and find_kernel(paths, name):
        raise BangerError(
            "already_exists",
            f"the kernel {name} is here already",
            hint=f"banger kernel show {name}",
        )


def list_kernels(paths: Paths) -> tuple[KernelRecord, ...]:
    """All entries, by name."""
    try:
        names = sorted(p.name for p in paths.kernels.iterdir() if not p.name.startswith("."))
    except FileNotFoundError:
        return ()
    return tuple(record for name in names if (record := find_kernel(paths, name)))


def delete_kernel(
    paths: Paths,
    name: str,
    *,
    job: Job | None = None,
    refuse: Callable[[KernelRecord], None] = lambda _: None,
) -> None:
    """Remove an entry. `refuse` raises when something refers to it.

    Waits for whoever makes an entry of this name: not for the event loop's thread.

    Raises:
        BangerError: not_found; what `refuse` raises.
    """
    job = job or Job()

    def put_aside(aside: Path) -> None:
        # Out of sight by one rename: an entry is never seen half removed.
        record = get_kernel(paths, name)
        refuse(record)
        Path(record.directory).rename(aside / name)

    with (
        lock_kernel(paths, name, job),
        files.staging_directory(paths.kernels, f"delete-{name}") as aside,
        step("discard.kernel"),
    ):
        job.at_once(lambda: put_aside(aside))
        files.sync_directory(paths.kernels)


def lock_kernel(paths: Paths, name: str, job: Job) -> AbstractContextManager[None]:
    """The lock that pull, rebuild and delete of one entry share."""
    return job.locked(paths.kernels / f".{check_entry_name(name, 'kernel')}.lock")


def verify_kernel(paths: Paths, name: str) -> tuple[str, ...]:
    """Hash every file of the entry; what differs from the manifest, in words."""
    record = get_kernel(paths, name)
    directory = Path(record.directory)
    problems = []
    for file, identity in _manifest(directory).files.items():
        try:
            check_identity(directory / file, identity, hash_always=True)
        except FileChanged as e:
            problems.append(str(e))
    return tuple(problems)


def check_kernel_files(record: KernelRecord) -> None:
    """The preflight of a start: files present with unchanged size and time (spec 4.5).

    A file with another time is hashed; when its content is what was recorded, it passes.

    Raises:
        BangerError: operation_failed, reason files_changed, naming the file.
    """
    directory = Path(record.directory)
    for file, identity in _manifest(directory).files.items():
        try:
            check_identity(directory / file, identity)
        except FileChanged as e:
            raise BangerError(
                "operation_failed",
                f"the kernel {record.name} is not what was stored: {e}",
                hint=f"banger kernel pull {record.name} --force",
                reason="files_changed",
            ) from e


def find_manifest(directory: Path) -> KernelManifest | None:
    """The manifest in `directory`; None when there is none.

    Raises:
        BangerError: operation_failed: it cannot be read, or says nothing sensible.
    """
    path = directory / MANIFEST
    try:
        return decode_json(path.read_bytes(), type=KernelManifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *MALFORMED) as e:
        raise BangerError(
            "operation_failed",
            f"reading the kernel manifest {path}: {e}",
            hint=f"banger kernel pull {directory.name} --force",
        ) from e


def write_manifest(directory: Path, manifest: KernelManifest) -> KernelRecord:
    """Write `manifest.json` into an entry's directory and return the record for it."""
    content = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2)
    files.write_atomic(directory / MANIFEST, content + b"\n", mode=0o444)
    return _record(directory, manifest)


def publish_entry(paths: Paths, name: str, new: Path) -> None:
    """Give a finished directory the entry's name; an entry that had it is where `new` was, then.

    Running VMs keep the files that they have open. The caller holds the lock of the name.
    """
    with step("kernel.publish"):
        files.publish_directory(new, paths.kernels / name)


def now_text() -> str:
    """The present, as manifests write it."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="seconds").replace("+00:00", "Z")


def _manifest(directory: Path) -> KernelManifest:
    manifest = find_manifest(directory)
    if manifest is None:
        raise BangerError(
            "not_found",
            f"the kernel entry {directory} is gone",
            hint=f"banger kernel pull {directory.name}",
        )
    return manifest


def _record(directory: Path, m: KernelManifest) -> KernelRecord:
    return KernelRecord(
        name=m.name,
        distro=m.distro,
        arch=m.arch,
        kernel_version=m.kernel_version,
        release=m.release,
        source=m.source,
        agent_version=m.agent_version,
        imported_at=m.imported_at,
        directory=str(directory),
        sha256={name: identity.sha256 for name, identity in m.files.items()},
    )
