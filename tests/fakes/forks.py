"""Work in processes that may be killed: forked in a moment from a server that has loaded it all.

The server is a program of one thread, so that its children are whole. A child runs one function of
an importable module, `function(*words)`, and ends; what it raises ends it with status 1 and is in
its log, except for what a fault ordered, which is status 3.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
ORDERED = 3


class Forks:
    """The parent's end. `run` returns the child's wait status as `subprocess` has it."""

    def __init__(self, log: Path, *modules: str) -> None:
        self.log = log
        path = os.pathsep.join(str(ROOT / part) for part in ("src", "tests", "."))
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from fakes.forks import serve; serve()", str(log), *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def run(self, function: str, *words: str) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([function, *words]).encode() + b"\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server of forks has ended"
        return int(line)

    def close(self) -> None:
        self._server.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def forks(log: Path, *modules: str) -> Iterator[Forks]:
    """A server that has imported these modules, until the block ends."""
    server = Forks(log, *modules)
    try:
        yield server
    finally:
        server.close()


def serve() -> None:
    """The server: one JSON line names the function and its words, one line answers."""
    log, modules = sys.argv[1], sys.argv[2:]
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin.buffer:
        function, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(log, function, words))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _run(log: str, function: str, words: list[str]) -> int:
    # The parent's pipes are not the child's.
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, number)
    module, _, name = function.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)(*words)
    except Exception as e:
        if _was_ordered(e):
            return ORDERED
        traceback.print_exc()
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _was_ordered(error: BaseException | None) -> bool:
    """Whether a fault is at the beginning of it: a full disk, or a failure on purpose."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC:
            return True
        if getattr(error, "reason", None) in ("injected", "disk_full"):
            return True
        error = error.__cause__ or error.__context__
    return False
