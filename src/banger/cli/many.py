"""Commands on several VMs at once: good targets go on when another is missing."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import click

from banger.cli.draw import print_json
from banger.cli.errors import show_error, wire_document
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_AT_ONCE = 16

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the results as a JSON list; of one that failed, "
    "its error."
)  # fmt: skip


def each(
    refs: Sequence[str],
    action: Callable[[str], T],
    done: Callable[[T], object],
    *,
    as_json: bool = False,
) -> int:
    """Do `action` for every reference at the same time, report in the order given; 1 if any failed.

    With `as_json` all of it is one list of results and errors, at the end. Duplicates are dropped.
    Ctrl-C does not wait for what the daemon is asked for: the end of our connections tells it.
    """
    wanted = {ref: Future[T]() for ref in refs}
    failed = False
    rows: list[Any] = []
    if len(wanted) == 1:
        # Here, where an interrupt arrives, and the call itself sees to it.
        _carry_out(wanted, action)
    else:
        _begin(wanted, action)
    try:
        for future in wanted.values():
            try:
                result = future.result()
            except BangerError as e:
                failed = True
                if as_json:
                    rows.append(wire_document(e))
                else:
                    show_error(e, as_json=False)
                continue
            if as_json:
                rows.append(result)
            else:
                done(result)
    except KeyboardInterrupt as e:
        if len(wanted) > 1:
            e.add_note(
                "what had begun is finished or given back; see: banger daemon operations list"
            )
        raise
    if as_json:
        print_json(rows)
    return 1 if failed else 0


def _begin(wanted: dict[str, Future[T]], action: Callable[[str], T]) -> None:
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for ref in wanted:
        todo.put(ref)

    def work() -> None:
        while True:
            try:
                ref = todo.get_nowait()
            except queue.Empty:
                return
            _carry_out({ref: wanted[ref]}, action)

    for _ in range(min(_AT_ONCE, len(wanted))):
        # No pool: its threads are waited for when the program ends.
        threading.Thread(target=work, daemon=True).start()


def _carry_out(wanted: dict[str, Future[T]], action: Callable[[str], T]) -> None:
    for ref, future in wanted.items():
        try:
            future.set_result(action(ref))
        except BaseException as e:
            future.set_exception(e)
