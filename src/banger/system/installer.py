"""`banger system install`: this banger as two services of the host, for one owner.

May be run again at any time: what is there already stays as it is, VMs run on, and services are
restarted only when something of theirs changed. A restart that fails brings back what was there.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import __version__
from banger.config.install import InstallRecord, format_install_record, read_install_record
from banger.config.settings import read_settings
from banger.errors import BangerError
from banger.files import locked, sync_directory, write_atomic
from banger.process import find_program
from banger.system import release
from banger.system.owner_files import ensure_owner_files
from banger.system.systemd import (
    UNITS,
    ask_state,
    require_systemd,
    restart_services,
    stop_services,
    systemctl,
)
from banger.system.units import build_units

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from banger.config.system_paths import SystemPaths

    Say = Callable[[str], None]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A file of ours as it was: what a failed restart brings back. `content` None: not there."""

    path: Path
    content: bytes | None


def find_owner(name: str) -> InstallRecord:
    """A record of a new installation for this user, by name or number.

    Raises:
        BangerError: there is no such user, it is root, or it has no home.
    """
    hint = "sudo banger system install --owner $USER"
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError) as e:
        raise BangerError(
            "not_found", f"installing for {name!r}: there is no such user here", hint=hint
        ) from e
    if entry.pw_uid == 0:
        raise BangerError(
            "bad_request",
            "installing for root: the daemon is to run as an ordinary user, without any privilege",
            hint=hint,
        )
    if not Path(entry.pw_dir).is_dir():
        raise BangerError(
            "bad_request",
            f"installing for {name}: the home directory {entry.pw_dir} does not exist",
            hint=f"getent passwd {name}",
        )
    return build_record(entry)


def build_record(entry: pwd.struct_passwd) -> InstallRecord:
    """The record of an installation of this banger that is made now."""
    try:
        from banger import _build as build  # type: ignore[attr-defined,unused-ignore]  # of a release
    except ImportError:
        build = None
    return InstallRecord(
        owner=entry.pw_name,
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        home=entry.pw_dir,
        installed_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        version=__version__,
        commit=getattr(build, "COMMIT", ""),
        built_at=getattr(build, "BUILT_AT", ""),
    )


def install(
    system: SystemPaths,
    wanted: InstallRecord,
    *,
    force: bool,
    say: Say,
    programs: Sequence[Path] = (),
) -> None:
    """Install or upgrade; returns when both services are ready. `say` gets each thing done.

    `force`: change the owner although there are VMs; they go to the new one. `programs`: where
    firecracker and jailer may lie, besides PATH, the owner's own directory and what is installed.

    Raises:
        BangerError: nothing was changed, or what was there before is there again and runs.
    """
    require_systemd(system)
    os.umask(0o022)
    for directory in (system.etc, system.programs, system.versions, system.bin):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(system.programs / ".lock"):
        settings = read_settings(system.config_file, home=Path(wanted.home))
        jails = Path(settings.jailer_chroot_base or system.jails)
        before = read_install_record(system)
        old_uid = _check_owner(system, before, wanted, force=force)
        places = (*programs, *_program_places(system, wanted))
        target = release.stage_release(system.versions, programs=places)
        say(f"release {target}")
        if not (target / "libexec/firecracker").exists():
            say("no pinned firecracker was found; `banger doctor` says how to get it")
        if old_uid is not None:
            stop_services()
            _hand_over(system, old_uid, wanted, say)
        _make_directories(system, wanted, jails)
        key = ensure_owner_files(system, wanted, target)
        say(f"ssh key {key}")
        record = _keep_date(before, wanted)
        files = {
            system.record: format_install_record(record),
            **build_units(system, record, target, jails),
        }
        _put_in_place(system, target, files, say)
        kept = [path.resolve() for path in (system.current, system.previous) if path.exists()]
        for gone in release.remove_other_releases(system.versions, kept):
            say(f"removed the release {gone.name}")


def count_vms(system: SystemPaths) -> int:
    """How many VM records there are: one directory each. Root reads no database of the owner's."""
    try:
        return sum(len(path.name) == 32 for path in (system.state / "vms").iterdir())
    except FileNotFoundError:
        return 0


def count_leases(system: SystemPaths) -> int:
    """How many VMs hold something on the host, which is as long as they run."""
    return len(list(system.ledger.glob("*.json"))) if system.ledger.is_dir() else 0


def _check_owner(
    system: SystemPaths, before: InstallRecord | None, wanted: InstallRecord, *, force: bool
) -> int | None:
    """The uid whose the state was, where it is to become another's."""
    uid = before.uid if before else None
    if uid is None and system.state.is_dir():
        uid = system.state.stat().st_uid  # what an uninstall has left
    if uid is None or uid == wanted.uid:
        return None
    name = before.owner if before and before.uid == uid else f"uid {uid}"
    doing = f"installing for {wanted.owner}: this host's banger is {name}'s"
    if running := count_leases(system):
        raise BangerError(
            "operation_failed",
            f"{doing}, and {running} of its VMs run",
            hint="sudo banger system uninstall --force --purge",
            reason="in_use",
        )
    if (vms := count_vms(system)) and not force:
        raise BangerError(
            "operation_failed",
            f"{doing}, and it has {vms} VMs; --force gives them to {wanted.owner}",
            hint="sudo banger system uninstall --purge",
            reason="in_use",
        )
    return uid


def _program_places(system: SystemPaths, wanted: InstallRecord) -> tuple[Path, ...]:
    on_path = [Path(found).parent for name in ("firecracker", "jailer")
               if (found := find_program(name))]  # fmt: skip
    return (
        *on_path,
        Path(wanted.home) / ".local/state/banger/bin",
        Path.home() / ".local/state/banger/bin",
        system.state / "bin",
        system.current / "libexec",
    )


def _make_directories(system: SystemPaths, owner: InstallRecord, jails: Path) -> None:
    for path in (system.state, system.cache):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        _give(path, owner)
    for path in (system.helper_state, jails):
        # The owner passes through to the jails of its machines, and sees none by name.
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o711)


def _hand_over(system: SystemPaths, old_uid: int, owner: InstallRecord, say: Say) -> None:
    """Make what the former owner had the new owner's.

    The former owner could have put anything there, links to other people's files included: only
    what is the former owner's own is given away, by descriptor.
    """
    for top in (system.state, system.cache):
        if not top.is_dir():
            continue
        for _, directories, names, parent in os.fwalk(top, follow_symlinks=False):
            for name in (*directories, *names):
                flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(name, flags, dir_fd=parent)
                    try:
                        found = os.fstat(fd)
                        if found.st_uid == old_uid and not stat.S_ISLNK(found.st_mode):
                            os.chown(f"/proc/self/fd/{fd}", owner.uid, owner.gid)
                    finally:
                        os.close(fd)
        say(f"{top} is {owner.owner}'s now")


def _give(path: Path, owner: InstallRecord) -> None:
    if os.geteuid() == 0:
        os.chown(path, owner.uid, owner.gid)


def _keep_date(before: InstallRecord | None, wanted: InstallRecord) -> InstallRecord:
    """The record that is there, where it says the same but for the time."""
    if before is None or before.uid != wanted.uid:
        return wanted
    return msgspec.structs.replace(wanted, installed_at=before.installed_at)


def _put_in_place(system: SystemPaths, target: Path, files: dict[Path, bytes], say: Say) -> None:
    """Switch to a release: files, links, services; back to what was there if they do not start."""
    first = not system.record.exists()
    old_release = system.current.resolve() if system.current.exists() else None
    changes = [Change(path=p, content=_read(p)) for p, content in files.items()
               if _read(p) != content]  # fmt: skip
    for change in changes:
        change.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(change.path, files[change.path], mode=0o644)
        change.path.chmod(0o644)
        say(f"wrote {change.path}")
    _link_release(system, target, old_release, say)
    try:
        _start(bool(changes), say)
    except BangerError as e:
        say("the services do not start: going back to what was there")
        _bring_back(system, changes, old_release, first=first, failure=e)
        raise


def _link_release(system: SystemPaths, target: Path, old_release: Path | None, say: Say) -> None:
    if old_release != target:
        if old_release is not None:
            _link(system.previous, Path("versions") / old_release.name)
        _link(system.current, Path("versions") / target.name)
        say(f"{system.current} -> versions/{target.name}")
    for name in release.PROGRAMS:
        link = system.bin / name
        # Relative, so that the tree may be looked at from elsewhere.
        wanted = Path(os.path.relpath(system.current / "bin" / name, system.bin))
        if not link.is_symlink() or link.readlink() != wanted:
            _link(link, wanted)
            say(f"{link} -> {wanted}")


def _start(changed: bool, say: Say) -> None:
    if changed:
        systemctl("daemon-reload")
    systemctl("enable", *UNITS)
    if changed or any(ask_state(unit) != "active" for unit in UNITS):
        restart_services()
    for unit in UNITS:
        say(f"{unit} is {ask_state(unit)}")


def _bring_back(
    system: SystemPaths,
    changes: list[Change],
    old_release: Path | None,
    *,
    first: bool,
    failure: BangerError,
) -> None:
    """What was there before, running as before; what fails on the way is added to the failure."""
    try:
        if first:
            stop_services()
            systemctl("disable", *UNITS)
        for change in changes:
            if change.content is None:
                change.path.unlink(missing_ok=True)
            else:
                write_atomic(change.path, change.content, mode=0o644)
        if old_release is not None:
            _link(system.current, Path("versions") / old_release.name)
        systemctl("daemon-reload")
        if not first:
            # Programs are back: so must be what runs them.
            restart_services()
        failure.also.append("rolled back")
    except (BangerError, OSError) as e:
        failure.also.append(f"rolling back: {e}")


def _link(link: Path, target: Path) -> None:
    staging = link.with_name(f".{link.name}.staging")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target)
    staging.replace(link)
    sync_directory(link.parent)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
