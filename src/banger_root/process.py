"""The helper's one gate for starting programs: root-owned places only, no environment, no shell."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Fixed: root runs nothing that a PATH of somebody else's making names.
DIRECTORIES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
_TAIL_BYTES = 2048
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
