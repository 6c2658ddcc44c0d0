"""The one gate through which banger starts programs on the host.

Lists only, never a shell; a scrubbed environment; stdin closed unless given; failures carry the
program's last words. A process started by `run*` ends with the call (cancelled or not); one started
by `spawn_detached` belongs to nobody's request and outlives the daemon.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

from banger.errors import DISK_FULL_HINT, BangerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TAIL_BYTES = 2048
# strerror(3) of ENOSPC and EDQUOT, in the locale that every program gets from us.
_NO_SPACE = ("No space left on device", "Disk quota exceeded")
# What a host tool may see of our environment: enough to find programs, proxies and certificates.
_KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "PIP_CONFIG_FILE",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "NPM_CONFIG_REGISTRY", "NPM_CONFIG_CAFILE",
)  # fmt: skip


class ProcessFailed(BangerError):
    """A host program ended badly. `status` is as in `subprocess` (negative: a signal); `how` is
    that in words."""

    def __init__(self, argv: Sequence[str], status: int, stderr: bytes) -> None:
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr[-_TAIL_BYTES:].decode(errors="replace").strip()
        self.how = (
            f"was killed by {signal.Signals(-status).name}"
            if status < 0
            else f"ended with status {status}"
        )
        words = f": {self.stderr}" if self.stderr else ""
        full = any(text in self.stderr for text in _NO_SPACE)
        super().__init__(
            "operation_failed",
            f"{Path(argv[0]).name} {self.how}{words}",
            hint=DISK_FULL_HINT if full else None,
            reason="disk_full" if full else None,
        )


def host_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of host tools: the few variables they need, plus `extra`."""
    env = {k: v for k in _KEPT if (v := os.environ.get(k)) is not None}
    # Debian keeps mkfs and nft in sbin, which is not on every user's PATH.
    path = env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    env["PATH"] = f"{path}:/usr/local/sbin:/usr/sbin:/sbin"
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def find_program(name: str) -> str | None:
    """The absolute path of a host program, or None."""
    import shutil

    return shutil.which(name, path=host_environment()["PATH"])


def get_program(name: str, *, package: str) -> str:
    """The absolute path of a host program.

    Raises:
        BangerError: not_found, naming the distribution package that has it.
    """
    if found := find_program(name):
        return found
    raise BangerError(
        "not_found",
        f"the program {name} is not installed on this host (Debian package {package})",
        hint=f"sudo apt-get install {package}",
    )


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    check: bool = True,
    user: tuple[int, int] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return its output, for use in threads and in the CLI.

    `user`: the uid and gid that it runs as, in no other group; only root can say so.

    Raises:
        ProcessFailed: it ended with another status than 0 and `check` is set.
        BangerError: it could not be started, or `timeout_s` passed (it was killed).
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            cwd=cwd,
            env=host_environment(env),
            timeout=timeout_s,
            check=False,
            user=None if user is None else user[0],
            group=None if user is None else user[1],
            extra_groups=None if user is None else [],
        )
    except subprocess.TimeoutExpired as e:
        raise BangerError(
            "operation_failed", f"{Path(argv[0]).name} did not end within {timeout_s:g} s"
        ) from e
    except OSError as e:
        raise BangerError("operation_failed", f"starting {argv[0]}: {e.strerror}") from e
    if check and done.returncode != 0:
        raise ProcessFailed(argv, done.returncode, done.stderr)
    return done


async def run_async(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """As `run`, on the event loop. Cancelling kills the program's process group."""
    # Only the daemon has a loop; the command line's start should not pay for it.
    import asyncio

    try:
        p = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=host_environment(env),
            start_new_session=True,
        )
    except OSError as e:
        raise BangerError("operation_failed", f"starting {argv[0]}: {e.strerror}") from e
    try:
        out, err = await p.communicate(stdin)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
        await p.wait()
        raise
    assert p.returncode is not None
    if check and p.returncode != 0:
        raise ProcessFailed(argv, p.returncode, err)
    return subprocess.CompletedProcess(list(argv), p.returncode, out, err)


def popen(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start one member of a pipeline; the caller owns it and waits for it.

    Raises:
        BangerError: it could not be started.
    """
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=host_environment(env),
        )
    except OSError as e:
        raise BangerError("operation_failed", f"starting {argv[0]}: {e.strerror}") from e


def spawn_detached(
    argv: Sequence[str],
    *,
    cwd: Path,
    output: int,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """Start a program that outlives us: own session, stdin closed, stdout and stderr to `output`.

    Returns the pid. The caller reaps it while it lives; afterwards init does.

    Raises:
        BangerError: it could not be started.
    """
    try:
        p = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env=dict(env or {}),
            pass_fds=pass_fds,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as e:
        raise BangerError("operation_failed", f"starting {argv[0]}: {e.strerror}") from e
    # Reaping is the caller's business (pidfd); the Popen object must not warn or poll.
    p.returncode = 0
    return p.pid


def run_attached(argv: Sequence[str]) -> int:
    """Run a program on the user's own terminal, with the user's own environment; its exit status.

    Ctrl-C is the program's to handle: it is in our foreground group and hears of it itself.

    Raises:
        BangerError: it could not be started.
    """
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        p = subprocess.Popen(
            list(argv),
            restore_signals=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        status = p.wait()
    except OSError as e:
        raise BangerError("operation_failed", f"starting {argv[0]}: {e.strerror}") from e
    finally:
        signal.signal(signal.SIGINT, old)
    return 128 - status if status < 0 else status


def read_stat(pid: int) -> tuple[str, int] | None:
    """State and start time (clock ticks since boot) of a process; None when it is gone.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in field 2 may hold spaces and parentheses: count after the last one.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


@functools.cache
def find_boot_id() -> str | None:
    """The kernel's name for this boot, None where it does not tell. Start times count from it.

    Source: random(4).
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def open_process(pid: int, start_time: int) -> int | None:
    """A pidfd of this very process (readable when it has ended); None when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # After the open: from here on the pid cannot change hands unseen.
    stat = read_stat(pid)
    if stat is None or stat[1] != start_time:
        os.close(fd)
        return None
    return fd
