"""`banger doctor`: what keeps banger from working here, and the command that mends it."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import click

from banger.cli.draw import print_json, progress, quiet_option
from banger.cli.errors import color
from banger.cli.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.api.doctor import DoctorRow
    from banger.cli.draw import Painter
    from banger.cli.guest_command import GuestCommand

T = TypeVar("T")

# What is over sooner needs no progress.
_PATIENCE_S = 1.0
_COLORS = {"PASS": "\x1b[32m", "WARN": "\x1b[33m", "FAIL": "\x1b[1;31m"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--fix", is_flag=True, help="Do the safe mending, and say what was done.")
@click.option("--deep", is_flag=True, help="Also make a lease, and boot a small VM.")
@quiet_option
@click.pass_obj
def doctor(guest: GuestCommand, as_json: bool, fix: bool, deep: bool, quiet: bool) -> int:
    """Look for what keeps banger from working here. Exit status 1 when a row says FAIL.

    \b
    banger doctor            every check, with the command that mends what is wrong
    banger doctor --fix      fetch firecracker, give back leftovers, set modes
    banger doctor --deep     also try a lease and a VM, with their times
    """
    guest.refuse()
    # Only this command pays for loading the checks.
    from banger.doctor.deep import look_deeper
    from banger.doctor.examine import examine, mend
    from banger.doctor.world import World

    server = Server()

    def world() -> World:
        return World(server.paths, line=server)

    report = _Progress()
    rows = _patiently(lambda: examine(world(), report), report, quiet=quiet)
    if fix or deep:
        with progress(quiet=quiet) as painter:
            report.attach(painter)
            if fix:
                rows = mend(rows, world(), world, report)
            if deep:
                rows = [*rows, *look_deeper(world(), report)]
    if as_json:
        print_json(rows)
    else:
        sys.stdout.write(format_rows(rows, colored=sys.stdout.isatty() and color()))
    return 1 if any(row.level == "FAIL" for row in rows) else 0


def format_rows(rows: list[DoctorRow], *, colored: bool) -> str:
    """Level, check and sentence of each row; indented below it details, command, what was done."""
    width = max((len(row.check) for row in rows), default=0)
    indent = " " * (4 + 2 + width + 2)
    lines = []
    for row in rows:
        on, off = (_COLORS[row.level], "\x1b[0m") if colored else ("", "")
        lines.append(f"{on}{row.level}{off}  {row.check.ljust(width)}  {_plain(row.message)}")
        lines += [f"{indent}{_plain(line)}" for line in row.details]
        lines += [f"{indent}fixed: {_plain(line)}" for line in row.fixed]
        if row.level != "PASS" and row.command:
            lines.append(f"{indent}mend it: {_plain(row.command)}")
    levels = [row.level for row in rows]
    lines.append(
        f"{levels.count('PASS')} passed, {levels.count('WARN')} warnings, "
        f"{levels.count('FAIL')} failed"
    )
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """One line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in text)


class _Progress:
    """A reporter that has a listener only from the moment when somebody has waited for a while."""

    def __init__(self) -> None:
        self._painter: Painter | None = None
        self._last: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def attach(self, painter: Painter | None) -> None:
        with self._lock:
            self._painter = painter
            if painter is not None and self._last is not None:
                painter(self._last)

    def event(self, event: dict[str, Any]) -> None:
        """As it came from the daemon."""
        with self._lock:
            if "stage" in event:
                self._last = event
            if self._painter is not None:
                self._painter(event)

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.event({"stage": stage, "label": label, "detail": detail})

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        self.event({"done": done, "total": total, "detail": detail})

    def warn(self, message: str) -> None:
        self.event({"warning": message})


def _patiently(work: Callable[[], T], report: _Progress, *, quiet: bool) -> T:
    """The result of `work`, with progress once it has taken longer than a moment."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        try:
            return future.result(timeout=_PATIENCE_S)
        except TimeoutError:
            if future.done():
                raise
        with progress(quiet=quiet) as painter:
            report.attach(painter)
            try:
                return future.result()
            finally:
                report.attach(None)
