"""The helper's one gate for starting programs: root-owned places only, no environment, no shell."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from typing import TYPE_CHECKING, NoReturn

from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Fixed: root runs nothing that a PATH of somebody else's making names.
DIRECTORIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
_TAIL_BYTES = 2048
_PR_SET_NO_NEW_PRIVS = 38
_ENVIRONMENT = {"PATH": ":".join(DIRECTORIES), "LC_ALL": "C"}


class ProgramFailed(HelperError):
    """A program ended badly; `stderr` has its last words."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        self.stderr = stderr
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        super().__init__(
            "operation_failed", f"{os.path.basename(argv[0])} ended {how}: {stderr.strip()}"
        )


def find_program(name: str) -> str | None:
    """The path of an executable in the system's own directories, or None."""
    for directory in DIRECTORIES:
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def run(name: str, arguments: Sequence[str], *, stdin: str = "", timeout_s: float = 20.0) -> str:
    """Run a program to its end; return what it wrote to stdout.

    Raises:
        ProgramFailed: it ended with another status than 0.
        HelperError: it is not installed, could not be started, or took longer than `timeout_s`.
    """
    path = find_program(name)
    if path is None:
        raise HelperError(
            "operation_failed",
            f"the program {name} is not installed on this host",
            hint=f"sudo apt-get install {'nftables' if name == 'nft' else name}",
        )
    argv = [path, *arguments]
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            cwd="/",
            env=_ENVIRONMENT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise HelperError("operation_failed", f"{name} did not end within {timeout_s:g} s") from e
    except OSError as e:
        raise HelperError("operation_failed", f"starting {path}: {e.strerror}") from e
    if done.returncode != 0:
        raise ProgramFailed(argv, done.returncode, done.stderr[-_TAIL_BYTES:])
    return done.stdout


def fork(live: Callable[[], int]) -> int:
    """Start a copy of this process, which calls `live` and ends with the status that it returns.

    Returns the copy's pid, in the first process only. An error in `live` ends the copy with 127.

    Raises:
        OSError
    """
    pid = os.fork()
    if pid != 0:
        return pid
    status = 127
    try:
        status = live()
    finally:
        # Neither our caller's handlers nor its clean-up are the copy's to run.
        os._exit(status)


def become(argv: list[str], *, output: int) -> NoReturn:
    """Turn this process into a program: no environment, umask 077, stdin empty, no way to more
    rights than it has, and `output` as its stdout and stderr. All other descriptors close.

    Raises:
        OSError
    """
    os.umask(0o077)
    os.chdir("/")
    nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    for fd, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    # What is ignored stays ignored over an exec, what is caught does not.
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.execve(argv[0], argv, {})  # noqa: S606 - this is the gate
