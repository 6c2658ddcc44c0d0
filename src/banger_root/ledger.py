"""The ledger: one JSON file per lease, the truth about what a lease may hold on this host.

An entry is written and synced before the first object of a lease is made, and again before each
further one, so that it always names at least what exists. It lasts until everything is given back;
a crash of the helper, the daemon or both leaves it in place. The directory belongs to root alone,
also where its parent is the owner's; it is reached through one descriptor only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from banger_root import validate
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger_root.validate import LeasePlan

_SCHEMA = 1
_FILE_LIMIT = 64 << 10

STATES = ("making", "ready", "releasing")
STEPS = ("bridge", "elements", "tap", "cgroup")
"""What a lease can hold, in the order in which it is made."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One lease: its plan, how far it got, and what of it may exist."""

    plan: LeasePlan
    owner_uid: int
    state: str
    held: tuple[str, ...]
    created_at: float
    """Seconds since the epoch."""
    scope: str | None = None
    """The systemd scope of the VMM, noted before it is started; None without systemd."""
    pid: int | None = None
    start_time: int | None = None
    """Of the VMM that was launched: clock ticks since boot. Both or neither."""

    @property
    def id(self) -> str:
        """A VM has one lease, so its id is the VM's: known before the first call about it."""
        return self.plan.vm_id


class Ledger:
    """An open ledger directory."""

    def __init__(self, directory: str) -> None:
        """Open the directory, making it (0700) where it is missing.

        Raises:
            HelperError: it is a symlink, not root's, or others may write into it.
        """
        self.directory = directory
        doing = f"opening the ledger {directory}"
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            self._fd = os.open(
                directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except OSError as e:
            raise HelperError(
                "operation_failed", f"{doing}: {e.strerror}", hint=f"ls -ld {directory}"
            ) from e
        st = os.fstat(self._fd)
        if st.st_uid != os.geteuid() or st.st_mode & 0o022:
            os.close(self._fd)
            raise HelperError(
                "operation_failed",
                f"{doing}: it belongs to uid {st.st_uid} with mode {stat.S_IMODE(st.st_mode):o}; "
                f"only uid {os.geteuid()} may write there",
                hint=f"ls -ld {directory}",
            )

    def close(self) -> None:
        os.close(self._fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other helpers on this ledger out: one that lost its daemon may still be at work."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def locked_lease(self, lease_id: str) -> Iterator[None]:
        """Keep others out of one lease; taken before `locked`, and held over waits for its VMM.

        Its file goes with its holder.
        """
        name = f".{lease_id}.lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                # Unlinked while held: who waited on that inode sees that it lost its name.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(
                        os.fstat(fd), os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                    ):
                        break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
            os.close(fd)

    def save(self, entry: Entry) -> None:
        """Write an entry durably: beside, fsync, rename, fsync of the directory.

        Raises:
            OSError: disk full and the like.
        """
        text = json.dumps(
            {
                "schema": _SCHEMA,
                "plan": validate.format_plan(entry.plan),
                "owner_uid": entry.owner_uid,
                "state": entry.state,
                "held": list(entry.held),
                "created_at": entry.created_at,
                "scope": entry.scope,
                "pid": entry.pid,
                "start_time": entry.start_time,
            }
        )
        beside = f".{entry.id}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(beside, flags, 0o600, dir_fd=self._fd)
        with os.fdopen(fd, "w", encoding="ascii") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.rename(beside, f"{entry.id}.json", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def remove(self, lease_id: str) -> None:
        """Forget a lease of which nothing is left.

        Raises:
            OSError
        """
        for name in (f"{lease_id}.json", f".{lease_id}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
        os.fsync(self._fd)

    def find(self, lease_id: str) -> Entry | None:
        """The entry of a lease, or None.

        Raises:
            HelperError: its file is damaged.
        """
        try:
            fd = os.open(
                f"{lease_id}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd
            )
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as f:
            content = f.read(_FILE_LIMIT + 1)
        try:
            entry = _parse_entry(content)
            if entry.id != lease_id:
                raise HelperError("bad_request", f"it is the entry of {entry.id}")
        except HelperError as e:
            raise HelperError(
                "operation_failed",
                f"reading the ledger file {self.directory}/{lease_id}.json: {e.message}",
                hint=f"sudo cat {self.directory}/{lease_id}.json",
            ) from e
        return entry

    def entries(self) -> tuple[list[Entry], list[str]]:
        """Every entry, oldest first, and the problems of the files that cannot be read."""
        found: list[Entry] = []
        problems: list[str] = []
        for name in sorted(os.listdir(self._fd)):
            stem, extension = os.path.splitext(name)
            if extension != ".json":
                continue
            try:
                entry = self.find(validate.parse_lease_id(stem))
            except HelperError as e:
                problems.append(e.message)
                continue
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda e: e.created_at), problems


def _parse_entry(content: bytes) -> Entry:
    document = validate.parse_document(content)
    expected = {"schema", "plan", "owner_uid", "state", "held", "created_at"}
    document = {"scope": None, "pid": None, "start_time": None, **document}
    expected |= {"scope", "pid", "start_time"}
    if set(document) != expected or document["schema"] != _SCHEMA:
        raise HelperError("bad_request", f"it is no lease of schema {_SCHEMA}")
    plan: Any = document["plan"]
    held, state, created_at = document["held"], document["state"], document["created_at"]
    scope, pid, start_time = document["scope"], document["pid"], document["start_time"]
    if (
        type(plan) is not dict
        or type(document["owner_uid"]) is not int
        or state not in STATES
        or type(held) is not list
        or any(step not in STEPS for step in held)
        or type(created_at) not in (int, float)
        or type(scope) not in (str, type(None))
        or type(pid) not in (int, type(None))
        or type(start_time) is not type(pid)
    ):
        raise HelperError("bad_request", "a field has a value that the helper never writes")
    return Entry(
        plan=validate.parse_prepare(plan),
        owner_uid=document["owner_uid"],
        state=state,
        held=tuple(held),
        created_at=float(created_at),
        scope=scope,
        pid=pid,
        start_time=start_time,
    )
