"""Set-up steps: named, skipped when done, safe to interrupt.

A step is done when its stamp holds the key of its inputs and its result exists. The stamp is
written last and the result appears whole (made in a staging place, then renamed), so a step that
was interrupted simply runs again. One set-up runs at a time; a second one waits for the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
STAMPS = BUILD / "setup"
LOGS = BUILD / "log"
_TAIL_LINES = 40


class StepFailed(Exception):
    """A step could not be done; the text says what to do about it."""


@dataclass(frozen=True)
class Step:
    """One step of the set-up.

    `key` hashes the inputs; `is_done` looks at the result itself, quickly; `do` makes it. A step
    whose result proves itself (a file with a known hash, a program on PATH) has the key "".
    """

    name: str
    title: str
    key: Callable[[], str]
    is_done: Callable[[], bool]
    do: Callable[[], None]

    @property
    def stamp(self) -> Path:
        return STAMPS / self.name

    def is_current(self) -> bool:
        """Whether there is nothing to do."""
        key = self.key()
        return (not key or _read(self.stamp) == key) and self.is_done()


def run_steps(steps: Sequence[Step]) -> None:
    """Bring every step up to date, in order, with one line for each that had something to do.

    Raises:
        StepFailed: with the name of the step in its text.
    """
    if all(step.is_current() for step in steps):
        return
    with _only_one():
        for step in steps:
            if not step.is_current():
                _run_step(step)


def _run_step(step: Step) -> None:
    started = time.monotonic()
    say(f"setup: {step.title} …")
    # Gone before the work begins: an interrupted step must not look done because an older one was.
    step.stamp.unlink(missing_ok=True)
    key = step.key()
    try:
        step.do()
    except StepFailed as e:
        raise StepFailed(f"{step.title}: {e}") from e
    if not step.is_done():
        raise StepFailed(f"{step.title}: it ran, but its result is not there")
    if key:
        write_whole(step.stamp, key)
    say(f"setup: {step.title} … done {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    STAMPS.mkdir(parents=True, exist_ok=True)
    with (STAMPS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("setup: waiting for another set-up of this checkout …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(line: str) -> None:
    """One line of progress; stdout belongs to the command that follows."""
    print(line, file=sys.stderr, flush=True)


def run(
    argv: Sequence[str | Path],
    *,
    log: str | None,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a program with its output in `build/log/<log>.log`; its end is shown when it fails.

    With no `log` the program shows its own progress.

    Raises:
        StepFailed: naming program, status, last lines and log.
    """
    words = [str(word) for word in argv]
    environment = {**os.environ, **(env or {})}
    if log is None:
        if (status := _wait(words, None, cwd, environment)) != 0:
            raise StepFailed(f"{shlex.join(words)} ended with status {status}")
        return
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    with path.open("ab") as out:
        out.write(f"$ {shlex.join(words)}\n".encode())
        out.flush()
        start = out.tell()
        status = _wait(words, out.fileno(), cwd, environment)
    if status != 0:
        with path.open("rb") as f:
            f.seek(start)
            tail = f.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        text = "\n".join(["", *(f"    {line}" for line in tail)])
        raise StepFailed(f"{shlex.join(words[:4])} … ended with status {status}{text}\nlog: {path}")


def _wait(argv: Sequence[str], output: int | None, cwd: Path, env: Mapping[str, str]) -> int:
    started = time.monotonic()
    live = output is not None and sys.stderr.isatty()
    process: subprocess.Popen[bytes] | None = None
    try:
        with _ctrl_c_later():
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env
            )
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if live:
                    name = Path(argv[0]).name
                    sys.stderr.write(f"\r  {name} … {time.monotonic() - started:.0f} s")
                    sys.stderr.flush()
    except OSError as e:
        raise StepFailed(f"starting {argv[0]}: {e.strerror}") from e
    except BaseException:
        if process is None:
            raise
        # Ctrl-C reached the whole process group; what ignores it (apt does) is waited for, because
        # a package manager that is killed leaves a half-configured system.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
        raise
    finally:
        if live:
            sys.stderr.write("\r\033[K")


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C in the block takes effect at its end: in the middle of a start the program may run
    already, and nobody could wait for it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, which programs inherit
        yield
        return
    pressed: list[int] = []
    try:
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    except ValueError:  # a thread beside the main one, which hears of no signal
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def hash_files(paths: Iterable[Path], *words: str) -> str:
    """A key of names, contents and extra words."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        name = os.path.relpath(path, ROOT)
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def has_sha256(path: Path, wanted: str) -> bool:
    """Whether the file is there with exactly this content."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == wanted
    except OSError:
        return False


def write_whole(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(text)
    staging.chmod(mode)
    staging.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cache_dir() -> Path:
    """Where downloads and built artefacts are kept between checkouts."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """The state directory of a user-mode installation."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return (Path(value) if value.startswith("/") else Path.home() / default) / "banger"
