"""Commands on several VMs at once: good targets go on when another is missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from banger.cli.errors import show_error
from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_AT_ONCE = 16


def each(refs: Sequence[str], action: Callable[[str], T], done: Callable[[T], object]) -> int:
    """Do `action` for every reference at the same time, report in the order given; 1 if any failed.

    Duplicates are dropped.
    """
    wanted = list(dict.fromkeys(refs))
    failed = False
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(wanted))) as pool:
        for future in [pool.submit(action, ref) for ref in wanted]:
            try:
                done(future.result())
            except BangerError as e:
                failed = True
                show_error(e, as_json=False)
    return 1 if failed else 0
