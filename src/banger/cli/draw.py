"""Progress and tables. Live on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

import click

from banger.cli.errors import harmless, harmless_json, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Painter(Protocol):
    def __call__(self, event: dict[str, Any]) -> None: ...


def quiet_option(command: Any) -> Any:
    return click.option("-q", "--quiet", is_flag=True, help="No progress.")(command)


def always_json(command: Any) -> Any:
    """For a command that prints JSON in any case: who asks for it is not told off."""
    return click.option("--json", is_flag=True, expose_value=False, hidden=True)(command)


def verbose_option(command: Any) -> Any:
    return click.option("-v", "--verbose", is_flag=True, help="Show how long each stage took.")(
        command
    )


@contextlib.contextmanager
def progress(*, quiet: bool = False, verbose: bool = False) -> Iterator[Painter]:
    """A listener for progress events, drawn until the context ends."""
    if quiet:
        yield _only_warnings
    elif sys.stderr.isatty() and not verbose:
        with _live() as painter:
            yield painter
    else:
        yield _Plain(verbose=verbose)


def _only_warnings(event: dict[str, Any]) -> None:
    if "warning" in event:
        warn(f"warning: {event['warning']}")


class _Plain:
    """One line per stage; with times when asked."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._stage: str | None = None
        self._began = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        _only_warnings(event)
        if "output" in event:
            sys.stderr.write(f"{harmless(event['output'])}\n")
            sys.stderr.flush()
        if "stage" not in event:
            return
        now = time.monotonic()
        if self._verbose and self._stage is not None:
            sys.stderr.write(f"  {self._stage}: {(now - self._began) * 1000:.0f} ms\n")
        self._stage, self._began = event["stage"], now
        detail = f" ({event['detail']})" if event.get("detail") else ""
        sys.stderr.write(harmless(f"{event['stage']}: {event['label']}{detail}") + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _live() -> Iterator[Painter]:
    from rich.console import Console
    from rich.markup import escape
    from rich.status import Status

    console = Console(stderr=True)
    label = "starting"
    with Status(label, console=console) as status:

        def paint(event: dict[str, Any]) -> None:
            nonlocal label
            if "warning" in event:
                console.print(f"banger: warning: {harmless(event['warning'])}", markup=False)
            if "output" in event:
                line = harmless(event["output"])
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            if "stage" in event:
                detail = f" ({event['detail']})" if event.get("detail") else ""
                label = escape(harmless(event["label"] + detail))
                status.update(label)
            elif "done" in event:
                status.update(f"{label} {escape(harmless(_amount(event)))}")

        yield paint


def _amount(event: dict[str, Any]) -> str:
    from banger.units import format_size

    detail = f" {event['detail']}" if event.get("detail") else ""
    if event.get("total"):
        return f"{event['done'] * 100 // event['total']}%{detail}"
    return f"{format_size(event['done'])}{detail}" if event["done"] >= 1024 else detail


_LAYOUT = re.compile(r"[\n\t]")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded by two spaces; no trailing blanks. Every row is one line, whatever a guest has
    called its programs."""
    rows = [[_LAYOUT.sub("?", harmless(cell)) for cell in row] for row in rows]
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headers, *rows]
    ]
    return "\n".join(lines) + "\n"


def print_json(value: Any) -> None:
    """A result as indented JSON on stdout."""
    import msgspec

    sys.stdout.write(harmless_json(msgspec.json.encode(value)) + "\n")
