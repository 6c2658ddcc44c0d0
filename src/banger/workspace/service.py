"""The one entry for putting a repository into a guest: the first time, and every later one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.faults import step
from banger.workspace.prepare import put_first
from banger.workspace.update import bring_up_to_date, recognise

if TYPE_CHECKING:
    from banger.workspace.prepare import Preparation, Prepared


def prepare(what: Preparation) -> Prepared:
    """Put the repository at the guest path; where it was put before, send what has changed.

    Raises:
        BangerError: as `put_first` and `bring_up_to_date`.
    """
    with step("prepare.put"):
        if what.manifest is not None:
            # The guest lists its files while this host looks at its own.
            with ThreadPoolExecutor(max_workers=1) as pool:
                done = bring_up_to_date(what, pool.submit(what.guest.scan, what.guest_path))
            if done is not None:
                return done
        try:
            return put_first(what)
        except BangerError as e:
            if e.code != "already_exists" or what.force:
                raise
            # The daemon may have been killed when the guest had everything and no record was made.
            if (found := recognise(what)) is None:
                raise
            return found
