"""The ledger: one JSON file per lease and per tap pool, the truth about what may exist of them.

An entry is written and synced before the first object of a lease is made, and again before each
further one, so that it always names at least what exists. It lasts until everything is given back;
a crash of the helper, the daemon or both leaves it in place. The directory belongs to root alone,
also where its parent is the owner's; it is reached through one descriptor only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from banger_root import fields, validate
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger_root.validate import Bridge, LeasePlan

_SCHEMA = 3
# Of helpers before this one: their leases can still be given back.
_OLDER_SCHEMAS = (1, 2)
_POOL_SCHEMA = 2
_FILE_LIMIT = 64 << 10

_POOL = ".pool"
POOL_LOCK = "pool"

STATES = ("making", "ready", "releasing")
STEPS = ("bridge", "tap", "elements", "cgroup", "jail")
"""What a lease can hold, in the order in which it is made."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One lease: its plan, how far it got, and what of it may exist."""

    plan: LeasePlan
    tap: str
    """Made for this lease, or taken from the pool."""
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
    boot_id: str | None = None
    """Of the kernel in which it was launched: in another one, pid and start time may be of any
    process. None where a helper before this one did not note it."""

    @property
    def id(self) -> str:
        """A VM has one lease, so its id is the VM's: known before the first call about it."""
        return self.plan.vm_id


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The taps that were made for whichever lease of a bridge comes next."""

    bridge: Bridge
    size: int
    """How many should be idle."""
    taps: tuple[str, ...]
    """All that may exist, in leases or not."""
    boot_id: str
    """Of the kernel in which they were made: another one has none of them."""


class Ledger:
    """An open ledger directory."""

    def __init__(self, directory: str) -> None:
        """Open the directory, making it (0700) where it is missing.

        Raises:
            HelperError: it is a symlink, not root's, or others may write into it.
        """
        self.directory = directory
        # Written on what is made, so that what a lost ledger leaves is known as ours, and what
        # another helper's ledger holds is not.
        digest = hashlib.sha256(os.path.realpath(directory).encode(errors="surrogateescape"))
        self.mark = f"banger-{digest.hexdigest()[:16]}"
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
        # A descriptor of this call's own: a lock belongs to the opening, and forked helpers share
        # the one above.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def locked_lease(self, lease_id: str, *, wait: bool = True) -> Iterator[None]:
        """Keep others out of one lease; taken before `locked`, and held over waits for its VMM.

        Its file goes with its holder. The pool has a lock of this kind, too (`POOL_LOCK`).

        Raises:
            BlockingIOError: somebody has it, and we are not to wait.
        """
        name = f".{lease_id}.lock"
        how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            fd = os.open(name, flags, 0o600, dir_fd=self._fd)
            try:
                fcntl.flock(fd, how)
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
        self._write(
            entry.id,
            f"{entry.id}.json",
            {
                "schema": _SCHEMA,
                "plan": validate.format_plan(entry.plan),
                "tap": entry.tap,
                "owner_uid": entry.owner_uid,
                "state": entry.state,
                "held": list(entry.held),
                "created_at": entry.created_at,
                "scope": entry.scope,
                "pid": entry.pid,
                "start_time": entry.start_time,
                "boot_id": entry.boot_id,
            },
        )

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
        name = f"{lease_id}.json"
        content = self._read(name)
        if content is None:
            return None
        with self._about(name):
            entry = _parse_entry(content)
            if entry.id != lease_id:
                raise HelperError("bad_request", f"it is the entry of {entry.id}")
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

    def save_pool(self, pool: Pool) -> None:
        """Write what is known of a pool durably; one that is to be empty and is, is forgotten.

        Raises:
            OSError
        """
        name = pool.bridge.name
        if not pool.taps and pool.size == 0:
            for file in (f"{name}{_POOL}", f".{name}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file, dir_fd=self._fd)
            os.fsync(self._fd)
            return
        self._write(
            name,
            f"{name}{_POOL}",
            {
                "schema": _POOL_SCHEMA,
                "bridge": validate.format_bridge(pool.bridge),
                "size": pool.size,
                "taps": list(pool.taps),
                "boot_id": pool.boot_id,
            },
        )

    def pools(self) -> tuple[list[Pool], list[str]]:
        """Every pool, and the problems of the files that cannot be read."""
        found: list[Pool] = []
        problems: list[str] = []
        for name in sorted(os.listdir(self._fd)):
            stem, extension = os.path.splitext(name)
            content = self._read(name) if extension == _POOL else None
            if content is None:
                continue
            try:
                with self._about(name):
                    found.append(_parse_pool(content, stem))
            except HelperError as e:
                problems.append(e.message)
        return found, problems

    def tidy(self) -> None:
        """Remove what helpers left that were killed in the middle of a write or with a lock.

        Raises:
            OSError
        """
        for name in os.listdir(self._fd):
            stem = name.removeprefix(".").removesuffix(".lock")
            if not name.startswith("."):
                continue
            bridge = validate.is_bridge_name(stem)
            try:
                # Whoever writes has the lock of what he writes about.
                with self.locked_lease(POOL_LOCK if bridge else stem, wait=False):
                    if not name.endswith(".lock"):
                        os.unlink(name, dir_fd=self._fd)
            except (BlockingIOError, FileNotFoundError):
                continue

    def _write(self, stem: str, name: str, document: dict[str, Any]) -> None:
        beside = f".{stem}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(beside, flags, 0o600, dir_fd=self._fd)
        with os.fdopen(fd, "w", encoding="ascii") as f:
            f.write(json.dumps(document))
            f.flush()
            os.fsync(f.fileno())
        os.rename(beside, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def _read(self, name: str) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as f:
            return f.read(_FILE_LIMIT + 1)

    @contextlib.contextmanager
    def _about(self, name: str) -> Iterator[None]:
        try:
            yield
        except HelperError as e:
            raise HelperError(
                "operation_failed",
                f"reading the ledger file {self.directory}/{name}: {e.message}",
                hint=f"sudo cat {self.directory}/{name}",
            ) from e


def _parse_entry(content: bytes) -> Entry:
    document = fields.parse_document(content)
    if document.get("schema") in _OLDER_SCHEMAS:
        document = {"scope": None, "pid": None, "start_time": None, "tap": "", **document}
        document["boot_id"] = None
    expected = {"schema", "plan", "tap", "owner_uid", "state", "held", "created_at"}
    expected |= {"scope", "pid", "start_time", "boot_id"}
    if set(document) != expected or document["schema"] not in (_SCHEMA, *_OLDER_SCHEMAS):
        raise HelperError("bad_request", f"it is no lease of schema {_SCHEMA}")
    plan: Any = document["plan"]
    tap: Any = document["tap"]
    held, state, created_at = document["held"], document["state"], document["created_at"]
    scope, pid, start_time = document["scope"], document["pid"], document["start_time"]
    boot_id = document["boot_id"]
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
        or type(boot_id) not in (str, type(None))
        or boot_id == ""
    ):
        raise HelperError("bad_request", "a field has a value that the helper never writes")
    if document["schema"] != 1:
        checked = validate.parse_prepare(plan)
        if tap != checked.own_tap and not (type(tap) is str and validate.is_pool_tap(tap)):
            raise HelperError("bad_request", "its tap is neither its own nor one of a pool")
    else:
        checked = validate.parse_plan_of_schema_1(plan)
        tap = checked.own_tap
    return Entry(
        plan=checked,
        tap=tap,
        owner_uid=document["owner_uid"],
        state=state,
        held=tuple(held),
        created_at=float(created_at),
        scope=scope,
        pid=pid,
        start_time=start_time,
        boot_id=boot_id,
    )


def _parse_pool(content: bytes, bridge_name: str) -> Pool:
    document = fields.parse_document(content)
    expected = {"schema", "bridge", "size", "taps", "boot_id"}
    if set(document) != expected or document["schema"] != _POOL_SCHEMA:
        raise HelperError("bad_request", f"it is no tap pool of schema {_POOL_SCHEMA}")
    taps, boot_id = document["taps"], document["boot_id"]
    plan = validate.parse_sweep({"pool": {"bridge": document["bridge"], "size": document["size"]}})
    assert plan is not None
    if (
        type(taps) is not list
        or not all(type(tap) is str and validate.is_pool_tap(tap) for tap in taps)
        or type(boot_id) is not str
        or plan.bridge.name != bridge_name
    ):
        raise HelperError("bad_request", "a field has a value that the helper never writes")
    return Pool(bridge=plan.bridge, size=plan.size, taps=tuple(taps), boot_id=boot_id)
