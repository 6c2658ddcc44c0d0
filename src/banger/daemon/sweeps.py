"""What the daemon looks after by itself, only while a VM runs: clocks, room on the disk, logs that
grow, figures, VMs that nobody uses.

Nothing here is state: a daemon that starts looks anew. With no VM running no timer ticks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.files import bound_file, write_atomic
from banger.host import clock
from banger.units import MIB
from banger.vm import idle, observe, space
from banger.vm.cleanup import is_live

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)

STALE_EVERY_S = 60.0
CONSOLE_MOST, CONSOLE_KEPT = 16 * MIB, 4 * MIB
# As the daemon's own log: two files of 4 MiB.
HELPER_LOG_BYTES = 4 * MIB


def find_reading(path: Path | None) -> clock.Reading | None:
    """The clocks that an earlier daemon of this boot has noted, or None."""
    try:
        return decode_json(path.read_bytes(), type=clock.Reading) if path else None
    except (OSError, *MALFORMED):
        return None


class Sweeps:
    """One loop of the daemon; `helper_log` is the log that a root helper of ours appends to.

    `kept` is where the clocks of the last look are noted for the next daemon: the host may sleep
    while none runs, and the guests of then are adopted. `read_clocks` is given by tests that let
    the host sleep.
    """

    def __init__(
        self,
        vms: VmContext,
        *,
        helper_log: Path | None,
        kept: Path | None = None,
        read_clocks: Callable[[], clock.Reading] = clock.read_clocks,
    ) -> None:
        self._vms = vms
        self._helper_log = helper_log
        self._read_clocks = read_clocks
        self._kept = kept
        self._timed = find_reading(kept) or read_clocks()
        self._note()
        self._telling: asyncio.Task[None] | None = None
        self._warned: str | None = None

    async def run(self) -> None:
        """Look again and again while VMs run, until cancelled."""
        stale_due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await self._vms.some_run.wait()
            look_for_stale = loop.time() >= stale_due
            if look_for_stale:
                stale_due = loop.time() + STALE_EVERY_S
            try:
                await self.look(stale=look_for_stale)
            except Exception:
                # A defect, or a disk that cannot even be asked: the next look gets its chance.
                log.exception("looking after the VMs")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._vms.settings.stats_poll_interval_s):
                    await self._vms.none_run.wait()

    async def look(self, *, stale: bool) -> None:
        """Everything once; with `stale` also for VMs that nobody uses."""
        await self.check_clocks()
        self._warn(await space.look(self._vms))
        live = [vm for vm in self._vms.store.list() if is_live(self._vms, vm)]
        await asyncio.to_thread(self._bound_logs, live)
        await asyncio.gather(*(observe.collect(self._vms, vm) for vm in live))
        if stale:
            after_s = self._vms.settings.auto_stop_stale_after_s
            for vm in idle.find_stale(self._vms.store.list(), datetime.now(UTC), after_s):
                # Of its own: a guest that takes its time to stop keeps nobody else waiting.
                self._vms.spawn(self._stop_unused(vm), f"auto-stop {vm.name}")

    async def check_clocks(self) -> None:
        """Return when every guest has been told the time, if a clock of the host has jumped.

        Before each request, because a guest must not run a command at a time that is hours ago.
        """
        now = self._read_clocks()
        jump = clock.find_jump(self._timed, now)
        if jump is not None:
            self._timed = now
            self._telling = asyncio.get_running_loop().create_task(self._tell_time(jump))
        if self._telling is not None and not self._telling.done():
            # Shielded: the next who comes waits for it, too.
            await asyncio.shield(self._telling)

    async def _tell_time(self, jump: str) -> None:
        vms = self._vms
        live = [vm for vm in vms.store.list() if is_live(vms, vm) and vm.paused is None]
        if live:
            log.info("%s: %d VMs are told the time", jump, len(live))
        await asyncio.gather(*(space.send_time(vms, vm) for vm in live))
        # Not before: a daemon that is killed meanwhile leaves it to the next one.
        self._note()

    def _note(self) -> None:
        if self._kept is None:
            return
        try:
            write_atomic(self._kept, msgspec.json.encode(self._timed))
        except OSError as e:
            log.warning("noting the host's clocks in %s: %s", self._kept, e.strerror)

    def _warn(self, warning: str | None) -> None:
        """Say it once, not at every look."""
        if warning is not None and self._warned is None:
            log.warning("%s", warning)
        elif warning is None and self._warned is not None:
            log.info("there is room on the disk again")
        self._warned = warning

    def _bound_logs(self, live: list[VmRecord]) -> None:
        logs = [
            (self._vms.vm_paths(vm.id).console, CONSOLE_MOST, CONSOLE_KEPT)
            for vm in live
            # A start quotes what was printed since its own beginning.
            if not self._vms.is_locked(vm.id)
        ]
        if self._helper_log is not None:
            logs.append((self._helper_log, HELPER_LOG_BYTES, HELPER_LOG_BYTES))
        for path, most, kept in logs:
            try:
                if bound_file(path, most_bytes=most, kept_bytes=kept):
                    log.info("%s had grown beyond %d MiB and was emptied", path, most // MIB)
            except OSError as e:
                log.warning("bounding %s: %s", path, e.strerror)

    async def _stop_unused(self, vm: VmRecord) -> None:
        try:
            await idle.stop_if_unused(self._vms, vm)
        except BangerError as e:
            log.warning("stopping VM %s, which nobody uses: %s", vm.name, e)
