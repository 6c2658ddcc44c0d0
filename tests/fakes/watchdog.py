"""A watchdog for tests of many things at once: what hangs is shown, task by task, and fails.

A test that only times out says nothing. This prints the stack of every task of every event loop
that it was given, and of every thread, and then ends what was waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import sys
import threading
from collections.abc import Callable, Iterable, Iterator


def describe_tasks(loops: Iterable[asyncio.AbstractEventLoop]) -> str:
    """The stack of every task, as text."""
    out = io.StringIO()
    for number, loop in enumerate(loops):
        tasks = asyncio.all_tasks(loop)
        out.write(f"--- event loop {number}: {len(tasks)} tasks\n")
        for task in sorted(tasks, key=lambda t: t.get_name()):
            task.print_stack(file=out)
    return out.getvalue()


@contextlib.contextmanager
def watchdog(
    timeout_s: float,
    loops: Callable[[], Iterable[asyncio.AbstractEventLoop]],
    end: Callable[[], object],
) -> Iterator[None]:
    """Fail when the block takes longer. `end`, from another thread, makes the block end then.

    Raises:
        AssertionError: it hung; what it hung in is on stderr.
    """
    barked = threading.Event()

    def bark() -> None:
        barked.set()
        sys.stderr.write(f"\nnothing happened for {timeout_s:g} s\n{describe_tasks(loops())}")
        faulthandler.dump_traceback(sys.__stderr__)
        end()

    timer = threading.Timer(timeout_s, bark)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as e:
        if barked.is_set():
            raise AssertionError(f"it hung for {timeout_s:g} s; the tasks are on stderr") from e
        raise
    finally:
        timer.cancel()
        timer.join()
    assert not barked.is_set(), f"it hung for {timeout_s:g} s; the tasks are on stderr"
