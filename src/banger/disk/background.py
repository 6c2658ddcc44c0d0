"""Long work in a thread, under an operation on the event loop.

A pull or a build is one synchronous loop over files and pipes. It runs in a thread as a `Job`: what
it reports is handed to the loop's thread, and cancelling the operation sets a flag, ends the host
programs that the job started and waits until the thread has given everything back. A job lives as
long as the call of `run_job`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import threading
from typing import IO, TYPE_CHECKING, TypeVar

from banger.errors import explain_disk_full
from banger.process import ProcessFailed, get_program, popen
from banger.progress import Reporter, Silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")

_TERM_GRACE_S = 20.0
_READER_GRACE_S = 5.0
_LOCK_RETRY_S = 0.05
_TAIL_BYTES = 4096


class JobCancelled(BaseException):
    """The operation was cancelled. No `Exception`: code that handles failures must not eat it."""


class Job:
    """What the working thread holds: the way to report, to hear of a cancellation, to run programs.

    Also usable without `run_job`, by tests and by callers that are synchronous themselves.
    """

    def __init__(
        self, reporter: Reporter | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._reporter = reporter or Silent()
        self._loop = loop
        self._cancelled = threading.Event()
        self._guard = threading.Lock()
        self._programs: set[subprocess.Popen[bytes]] = set()
        self._stops: list[Callable[[], None]] = []

    # Reporter
    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self._report(self._reporter.stage, stage, label, detail)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        self._report(self._reporter.advance, done, total, detail)

    def warn(self, message: str) -> None:
        self._report(self._reporter.warn, message)

    def at_once(self, work: Callable[[], T]) -> T:
        """Do something short on the event loop's thread, where nothing else happens meanwhile: a
        look at what others may change, and what follows from it."""
        if self._loop is None:
            return work()

        async def done() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result()

    def _report(self, tell: Callable[..., None], *what: object) -> None:
        if self._loop is None:
            tell(*what)
        else:
            self._loop.call_soon_threadsafe(tell, *what)

    # Cancellation
    def check(self) -> None:
        """To be called between two buffers and before each step that cannot be undone.

        Raises:
            JobCancelled: the operation was cancelled.
        """
        if self._cancelled.is_set():
            raise JobCancelled

    def wait(self, seconds: float) -> None:
        """Let time pass, until it is over or the operation is cancelled (JobCancelled)."""
        self._cancelled.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def interrupting(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a cancellation calls `stop`, from another thread."""
        with self._guard:
            self._stops.append(stop)
        try:
            self.check()
            yield
        finally:
            with self._guard:
                self._stops.remove(stop)

    def cancel(self) -> None:
        """Ask the thread to stop: flag, `interrupting` callbacks, SIGTERM to its programs."""
        self._cancelled.set()
        with self._guard:
            running = list(self._programs)
            stops = list(self._stops)
        for stop in stops:
            stop()
        for p in running:
            _signal_group(p, signal.SIGTERM)

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Hold an exclusive lock between processes and threads; waiting for it can be cancelled."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                self.check()
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # flock(2) cannot be woken from another thread, an event can.
                    self._cancelled.wait(_LOCK_RETRY_S)
            yield
        finally:
            os.close(fd)

    # Programs
    @contextlib.contextmanager
    def program(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """One member of a pipeline, in a process group of its own.

        Its stderr is read to the end; `on_line` sees each line. Leaving the block normally waits
        for the program; leaving it by an exception ends the whole group first.

        Raises:
            ProcessFailed: the program ended with another status than 0.
            JobCancelled: it was ended because the operation was.
        """
        self.check()
        setsid = get_program("setsid", package="util-linux")
        p = popen(
            [setsid, *argv], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd, env=env
        )
        with self._guard:
            self._programs.add(p)
        tail = bytearray()
        reader = threading.Thread(target=_read_lines, args=(p.stderr, tail, on_line), daemon=True)
        reader.start()
        try:
            self.check()  # a cancellation between the first check and the registration
            yield p
            _close(p)
            status = p.wait()
        except BaseException:
            _end_group(p)
            raise
        finally:
            _close(p)
            # A daemon that the program left behind may hold its stderr for ever.
            reader.join(_READER_GRACE_S)
            if p.stderr and not reader.is_alive():
                p.stderr.close()
            with self._guard:
                self._programs.discard(p)
        self.check()
        if status != 0:
            raise ProcessFailed(argv, status, bytes(tail))

    def run(
        self, argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> bytes:
        """Run a program to its end and return its stdout.

        Raises:
            ProcessFailed, JobCancelled: as `program`.
        """
        with self.program(argv, stdout=subprocess.PIPE, cwd=cwd, env=env) as p:
            assert p.stdout
            return p.stdout.read()


async def run_job(work: Callable[[Job], T], reporter: Reporter) -> T:
    """Run `work` in a thread. A cancelled caller gets its CancelledError when the thread has ended.

    Raises:
        whatever `work` raises.
    """
    job = Job(reporter, loop=asyncio.get_running_loop())
    task = asyncio.ensure_future(asyncio.to_thread(_guarded, work, job))
    try:
        return (await asyncio.shield(task))()
    except asyncio.CancelledError:
        job.cancel()
        while not task.done():
            # A second cancellation changes nothing: the thread has to give things back first.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


def _guarded(work: Callable[[Job], T], job: Job) -> Callable[[], T]:
    """The outcome of `work` as a value, so that no JobCancelled meets the event loop."""
    try:
        result = work(job)
    except BaseException as e:
        error = explain_disk_full(e)

        def fail() -> T:
            raise error

        return fail
    return lambda: result


def _read_lines(
    stream: IO[bytes] | None, tail: bytearray, on_line: Callable[[str], None] | None
) -> None:
    assert stream
    for line in stream:
        tail += line
        del tail[:-_TAIL_BYTES]
        if on_line:
            on_line(line.decode(errors="replace").rstrip())


def _close(p: subprocess.Popen[bytes]) -> None:
    for stream in (p.stdin, p.stdout):
        if stream:
            # What a dead reader did not take is not our failure; its status tells.
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _end_group(p: subprocess.Popen[bytes]) -> None:
    _signal_group(p, signal.SIGTERM)
    _close(p)
    try:
        p.wait(_TERM_GRACE_S)
    except subprocess.TimeoutExpired:
        _signal_group(p, signal.SIGKILL)
        p.wait()


def _signal_group(p: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if p.returncode is None:
        # Before setsid(1) has run, the group does not exist and the process itself is meant.
        try:
            os.killpg(p.pid, number)
        except ProcessLookupError:
            with contextlib.suppress(ProcessLookupError):
                p.send_signal(number)
