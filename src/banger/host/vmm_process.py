"""The VMM process: started in a session of its own, known by pid, start time and boot, waited for
once.

It belongs to nobody's request and outlives the daemon, even when that is killed. After a restart
it is not our child any more; a pidfd tells its end all the same, only the exit status is init's.
Sources: pidfd_open(2), waitid(2), proc(5), cgroups(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger import process
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Not STOP or CONT: they would make a VM look dead or alive behind the daemon's back.
_SIGNALS = ("TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2", "ABRT")


class ProcessRef(msgspec.Struct, frozen=True, kw_only=True):
    """A process that cannot be mistaken for another: `start_time` is in clock ticks since boot.

    What is on disk outlives a reboot, after which both may be another's. So the boot is named, too;
    None in what a banger wrote that did not: then pid and start time decide.
    """

    pid: int
    start_time: int
    boot_id: str | None = None

    @property
    def is_of_this_boot(self) -> bool:
        """False only where it is known to be of another."""
        now = process.find_boot_id()
        return self.boot_id is None or now is None or self.boot_id == now


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: by exit code, or by a signal (`"KILL"`)."""

    code: int | None = None
    signal: str | None = None

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.signal else f"status {self.code}"


async def launch_vmm(
    argv: Sequence[str], *, cwd: Path, console: Path, cgroup: str | None
) -> ProcessRef:
    """Start a VMM with stdin closed, an empty environment, umask 077, its output in `console`.

    Returns once it runs its own program. It may have ended since: `wait_exit` tells.

    Raises:
        BangerError: it could not be started, or not be moved into `cgroup` (then it is killed).
    """
    doing = f"starting {Path(argv[0]).name}"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        output = os.open(console, flags, 0o600)
    except OSError as e:
        raise BangerError(
            "operation_failed", f"{doing}: opening its console {console}: {e.strerror}"
        ) from e
    try:
        pid = process.spawn_detached(argv, cwd=cwd, output=output)
    finally:
        os.close(output)
    stat = process.read_stat(pid)
    # Not reaped yet, so the pid is taken even if the process has ended.
    assert stat is not None
    ref = ProcessRef(pid=pid, start_time=stat[1], boot_id=process.find_boot_id())
    if cgroup is not None:
        # After the exec, not before it: that would take a wrapper program. Nothing is lost, since
        # a write moves all threads, and a VMM has started no other process by now; what it used so
        # far stays charged to us.
        try:
            _write(Path(cgroup) / "cgroup.procs", str(pid))
        except OSError as e:
            if e.errno == errno.ESRCH:  # it has ended already
                return ref
            await kill_vmm(ref, None)
            raise BangerError(
                "operation_failed", f"{doing}: moving it into {cgroup}: {e.strerror}"
            ) from e
    return ref


def is_alive(ref: ProcessRef) -> bool:
    """Whether this very process runs; a zombie does not."""
    if not ref.is_of_this_boot:
        return False
    stat = process.read_stat(ref.pid)
    return stat is not None and stat[0] not in "ZX" and stat[1] == ref.start_time


async def wait_exit(ref: ProcessRef) -> ExitStatus | None:
    """Wait until the process has ended; its files and devices are closed by then.

    Returns how it ended where it is our child and its status was not taken before, else None. The
    child is reaped. May be cancelled, and called by several tasks at once.
    """
    with _opened(ref) as fd:
        if fd is None:
            return None
        status = await _wait_readable(fd)
        # All waiters of this loop have looked before the first of them gets here.
        _reap(fd)
        return status


async def kill_vmm(
    ref: ProcessRef, cgroup: str | None, *, timeout_s: float = 60.0
) -> ExitStatus | None:
    """Kill the VMM, with everything in its cgroup, and wait until its exit is seen.

    Returns as `wait_exit`. A process that has ended is fine.

    Raises:
        BangerError: it is still there after `timeout_s`: it hangs in the kernel.
    """
    if cgroup is not None:
        try:
            _write(Path(cgroup) / "cgroup.kill", "1")
        except OSError as e:
            # Gone with its last process, or older than cgroup.kill (Linux 5.14).
            if e.errno not in (errno.ENOENT, errno.ENODEV):
                raise BangerError("operation_failed", f"killing {cgroup}: {e.strerror}") from e
    # Also without having been moved into the cgroup it has to go.
    signal_vmm(ref, "KILL", missing_ok=True)
    try:
        async with asyncio.timeout(timeout_s):
            return await wait_exit(ref)
    except TimeoutError as e:
        raise BangerError(
            "operation_failed",
            f"killing the VMM (pid {ref.pid}): it is still there after {timeout_s:g} s",
            hint=f"sudo cat /proc/{ref.pid}/stack",
        ) from e


def signal_vmm(ref: ProcessRef, name: str, *, missing_ok: bool = False) -> None:
    """Send a signal by name (with or without SIG, any case) to this very process.

    Raises:
        BangerError: bad_request: a signal that is not for VMs; not_running: it has ended, unless
            `missing_ok`.
    """
    plain = name.upper().removeprefix("SIG")
    if plain not in _SIGNALS:
        raise BangerError(
            "bad_request", f"signal {name!r} is not for VMs; there are {', '.join(_SIGNALS)}"
        )
    with _opened(ref) as fd:
        if fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.Signals[f"SIG{plain}"])
                return
    if not missing_ok:
        raise BangerError("not_running", f"sending {plain} to pid {ref.pid}: it has ended")


@contextlib.contextmanager
def _opened(ref: ProcessRef) -> Iterator[int | None]:
    """A pidfd of this very process, None when it is gone."""
    fd = process.open_process(ref.pid, ref.start_time) if ref.is_of_this_boot else None
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


async def _wait_readable(fd: int) -> ExitStatus | None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[ExitStatus | None] = loop.create_future()

    def look() -> None:
        loop.remove_reader(fd)
        if not ended.done():
            ended.set_result(_look(fd))

    loop.add_reader(fd, look)
    try:
        return await ended
    finally:
        loop.remove_reader(fd)


def _look(fd: int) -> ExitStatus | None:
    """The status of an ended child, left in place for other waiters."""
    try:
        info = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if info is None:
        return None
    if info.si_code == os.CLD_EXITED:
        return ExitStatus(code=info.si_status)
    return ExitStatus(signal=signal.Signals(info.si_status).name.removeprefix("SIG"))


def _reap(fd: int) -> None:
    with contextlib.suppress(ChildProcessError):  # not our child, or reaped by another waiter
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)


def _write(path: Path, text: str) -> None:
    # Without O_CREAT: in a cgroup that would turn "no such file" into "permission denied".
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def find_process(pid: int) -> ProcessRef | None:
    """The process that has this pid now; None when there is none, or only a zombie."""
    stat = process.read_stat(pid)
    if stat is None or stat[0] in "ZX":
        return None
    return ProcessRef(pid=pid, start_time=stat[1], boot_id=process.find_boot_id())
