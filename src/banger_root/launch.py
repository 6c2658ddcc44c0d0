"""Starting the VMM of a lease in its jail.

One forked child becomes the VMM, with the same pid all the way: it takes its own session and mount
namespace, opens the owner's files there, binds them into the jail and executes the jailer, under
systemd through systemd-run. It does nothing before its pid is in the ledger. What it mounted nobody
else sees, and it goes with the VMM; what it leaves in the jail goes with the lease.
Sources: Firecracker docs/jailer.md, systemd-run(1), mount_namespaces(7), unix(7).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from banger_root import cgroup, jail, mounts, paths, process, scope, vmm
from banger_root.errors import HelperError
from banger_root.trust import trust_program
from banger_root.validate import READ_ONLY_ROLES, ROLES

if TYPE_CHECKING:
    from banger_root.ledger import Entry, Ledger
    from banger_root.validate import LaunchPlan

API_SOCKET = "api.sock"
# The names under which Firecracker's documents ask for them.
_KERNEL, _INITRD = "kernel", "initrd"
_TIMEOUT_S = 60.0
# Between two looks at whether the socket accepts; the end of the process is seen at once.
_LOOK_MS = 5
_TAIL_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where this helper may make jails and what it may open: fixed when it starts."""

    jail_base: str
    bin_dir: str
    roots: tuple[str, ...]
    """The installed state and runtime directory: files that a VMM writes lie beneath them."""


class Launcher:
    """Launches for the leases of one owner in one ledger."""

    def __init__(self, ledger: Ledger, site: Site, *, owner_uid: int) -> None:
        self._ledger = ledger
        self._site = site
        self._owner_uid = owner_uid

    def launch(self, plan: LaunchPlan) -> dict[str, Any]:
        """Start the VMM of a lease; answer when its API socket accepts connections.

        Raises:
            HelperError: it was refused, or ended: then nothing of it runs, and the lease stays.
        """
        doing = f"launching VM {plan.lease_id}"
        with self._ledger.locked_lease(plan.lease_id):
            entry = self._check(plan.lease_id, doing)
            try:
                return self._launch(plan, entry, doing)
            except OSError as e:
                raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e

    def signal(self, lease_id: str, name: str) -> dict[str, Any]:
        """Send a signal to the VMM of a lease.

        Raises:
            HelperError: not_found: no such lease; not_running.
        """
        vmm.send_signal(self._find(lease_id, f"sending {name} to VM {lease_id}"), name)
        return {}

    def _find(self, lease_id: str, doing: str) -> Entry:
        entry = self._ledger.find(lease_id)
        if entry is None:
            raise HelperError("not_found", f"{doing}: it has no lease", hint="banger vm list")
        if entry.owner_uid != self._owner_uid:
            raise HelperError("unauthorized", f"{doing}: its lease belongs to another user")
        return entry

    def _check(self, lease_id: str, doing: str) -> Entry:
        entry = self._find(lease_id, doing)
        if entry.state != "ready":
            raise HelperError(
                "operation_failed",
                f"{doing}: its lease is {entry.state}, not ready",
                hint="banger vm list",
                reason="in_use",
            )
        if not entry.plan.jail:
            raise HelperError(
                "operation_failed", f"{doing}: its lease has no jail", reason="unsupported"
            )
        if vmm.is_running(entry):
            raise HelperError(
                "already_exists",
                f"{doing}: its VMM runs already (pid {entry.pid})",
                hint="banger vm list",
                reason="in_use",
            )
        return entry

    def _launch(self, plan: LaunchPlan, entry: Entry, doing: str) -> dict[str, Any]:
        site, uid = self._site, self._owner_uid
        programs = {
            name: trust_program(name, path, bin_dir=site.bin_dir, owner_uid=uid)
            for name, path in (("firecracker", plan.firecracker_bin), ("jailer", plan.jailer_bin))
        }
        with contextlib.ExitStack() as stack:
            console = paths.open_log(plan.console, roots=site.roots, owner_uid=uid)
            stack.callback(os.close, console)
            before = os.fstat(console).st_size
            # A jail is used once: what an earlier VMM left in it is not there for this one.
            jail.make_jail(site.jail_base, entry.id)
            root = paths.open_directory(
                jail.jail_root(site.jail_base, entry.id), trusted=True, sticky_ok=True
            )
            stack.callback(os.close, root)
            argv = self._build_argv(entry, programs)
            directory = None
            if scope.has_systemd():
                scope.wait_free(entry.id)
                entry = replace(entry, scope=scope.name_scope(entry.id))
                argv = [
                    *scope.build_scope_argv(
                        entry.id, vcpu=entry.plan.vcpu, memory_mib=entry.plan.memory_mib
                    ),
                    *argv,
                ]
            else:
                entry, directory = self._make_cgroup(entry)
            child = _Child.fork(plan, self._site, uid, argv, directory, console)
            stack.callback(child.close)
            try:
                entry = replace(entry, **child.identity)
                self._save(entry)
                child.go()
                if not child.wait_ready(root, timeout_s=_TIMEOUT_S):
                    tail = _read_tail(console, before)
                    raise HelperError(
                        "operation_failed",
                        f"{doing}: {child.describe_end(_TIMEOUT_S)}{tail}",
                        hint="banger doctor",
                    )
                jail.open_to_owner(site.jail_base, entry.id)
            except BaseException as e:
                child.end()
                try:
                    self._save(replace(entry, pid=None, start_time=None, boot_id=None))
                    jail.make_jail(site.jail_base, entry.id)
                except (HelperError, OSError) as later:
                    if isinstance(e, HelperError):
                        e.also.append(str(later))
                raise
            return child.identity

    def _build_argv(self, entry: Entry, programs: dict[str, str]) -> list[str]:
        gid, _ = paths.find_groups(self._owner_uid)
        return [
            programs["jailer"],
            "--id", entry.id,
            "--exec-file", programs["firecracker"],
            "--uid", str(self._owner_uid),
            "--gid", str(gid),
            "--chroot-base-dir", self._site.jail_base,
            "--",
            "--api-sock", API_SOCKET,
            # Its own log goes to the same place as the guest's console.
            "--level", "Warning",
        ]  # fmt: skip

    def _make_cgroup(self, entry: Entry) -> tuple[Entry, str | None]:
        if "cgroup" not in entry.held:
            held = replace(entry, held=(*entry.held, "cgroup"))
            self._save(held)
            if cgroup.make_cgroup(entry.id, mark=self._ledger.mark) is None:
                return entry, None
            entry = held
        path = cgroup.find_directory(entry.id)
        if path is not None:
            scope.bound_cgroup(path, vcpu=entry.plan.vcpu, memory_mib=entry.plan.memory_mib)
        return entry, path

    def _save(self, entry: Entry) -> None:
        with self._ledger.locked():
            self._ledger.save(entry)


class _Child:
    """The process that becomes the VMM, and the two pipes to it: start, and what went wrong."""

    def __init__(self, pid: int, start: int, trouble: int) -> None:
        self.pid = pid
        self._start = start
        self._trouble = trouble
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None
        started = vmm.read_start_time(pid)
        # It waits for us, and is not reaped.
        assert started is not None
        self.identity: dict[str, Any] = {
            "pid": pid,
            "start_time": started,
            "boot_id": vmm.read_boot_id(),
        }

    @classmethod
    def fork(
        cls,
        plan: LaunchPlan,
        site: Site,
        owner_uid: int,
        argv: list[str],
        directory: str | None,
        console: int,
    ) -> _Child:
        started, start = os.pipe()
        trouble, troubled = os.pipe()

        def live() -> int:
            os.close(start)
            os.close(trouble)
            return _become_vmm(plan, site, owner_uid, argv, directory, console, started, troubled)

        pid = process.fork(live)
        os.close(started)
        os.close(troubled)
        return cls(pid, start, trouble)

    def go(self) -> None:
        """Let it begin."""
        os.write(self._start, b"g")

    def wait_ready(self, root: int, *, timeout_s: float) -> bool:
        """Wait until the API socket in the jail accepts; False: it has ended, or takes too long.

        Raises:
            HelperError: what it could not do before it executed its program.
        """
        trouble = b""
        while data := os.read(self._trouble, 1 << 16):
            trouble += data
        if trouble:
            raise HelperError(**json.loads(trouble))
        deadline = time.monotonic() + timeout_s
        while not _accepts(root):
            if vmm.wait_exit(self._pidfd, timeout_s=_LOOK_MS / 1000):
                return False
            if time.monotonic() > deadline:
                return False
        return True

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            _, self._status = os.waitpid(self.pid, 0)

    def describe_end(self, timeout_s: float) -> str:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return f"its API socket did not accept within {timeout_s:g} s"
        self._status = status
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return f"it ended with {how} before its API socket accepted"

    def close(self) -> None:
        for fd in (self._start, self._trouble, self._pidfd):
            os.close(fd)


def _become_vmm(
    plan: LaunchPlan,
    site: Site,
    owner_uid: int,
    argv: list[str],
    directory: str | None,
    console: int,
    started: int,
    troubled: int,
) -> int:
    """The life of the child up to its exec; it returns only when that did not come about."""
    try:
        # Empty when our parent died before the ledger knew us.
        if os.read(started, 1) == b"g":
            os.setsid()
            if directory is not None:
                scope.enter_cgroup(directory)
            mounts.enter_own_namespace()
            _fill_jail(plan, site, owner_uid)
            # The VMM may only add to it.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
            process.become(argv, output=os.open(f"/proc/self/fd/{console}", flags))
    except HelperError as e:
        _tell(troubled, e)
    except BaseException as e:
        words = e.strerror if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        _tell(troubled, HelperError("operation_failed", f"launching VM {plan.lease_id}: {words}"))
    return 127


def _fill_jail(plan: LaunchPlan, site: Site, owner_uid: int) -> None:
    """Open the owner's files and bind them; both in the mount namespace in which this is called."""
    root = paths.open_directory(
        jail.jail_root(site.jail_base, plan.lease_id), trusted=True, sticky_ok=True
    )
    own = {_INITRD: plan.initrd}
    foreign = {_KERNEL: plan.kernel}
    for role, path in zip(ROLES, plan.drives, strict=True):
        (foreign if role in READ_ONLY_ROLES else own)[role] = path
    for name, path in foreign.items():
        fd = paths.open_readable(path, owner_uid=owner_uid)
        mounts.bind(fd, root, name, read_only=True)
        os.close(fd)
    for name, path in own.items():
        fd = paths.open_writable(path, roots=site.roots, owner_uid=owner_uid)
        # The guest's kernel unpacks it, the VMM only reads it.
        mounts.bind(fd, root, name, read_only=name == _INITRD)
        os.close(fd)
    os.close(root)


def _tell(troubled: int, error: HelperError) -> None:
    fields = ("code", "message", "hint", "reason")
    os.write(troubled, json.dumps({name: getattr(error, name) for name in fields}).encode())


def _accepts(root: int) -> bool:
    """Whether the API socket accepts. By descriptor: the jail is not ours alone any more."""
    try:
        fd = os.open(API_SOCKET, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return False
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.setblocking(False)
            s.connect(f"/proc/self/fd/{fd}")
        return True
    except OSError as e:
        if e.errno not in (errno.ECONNREFUSED, errno.EAGAIN):
            raise
        return False
    finally:
        os.close(fd)


def _read_tail(console: int, since: int) -> str:
    """The last words on the console, made harmless: they end up on terminals and in logs."""
    size = os.fstat(console).st_size
    begin = max(since, size - _TAIL_BYTES)
    text = os.pread(console, _TAIL_BYTES, begin).decode(errors="replace").strip()
    shown = "".join(c if c.isprintable() else " " for c in text)
    return f"; its last words: {shown}" if shown else ""
