"""VMs that nobody uses: stopped after `auto_stop_stale_after`, once the guest itself agrees.

A VM is touched by what the daemon is asked for; an exec, an attach, an ssh connection or a session
may last for days without that. So the guest is asked first, and one that does not answer is left
alone: what it is doing is not known.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.store.vms import now_text
from banger.units import format_duration
from banger.vm.cleanup import is_live
from banger.vm.stop import stop

if TYPE_CHECKING:
    from collections.abc import Iterable

    from banger.api.records import VmRecord
    from banger.vm.context import VmContext

log = logging.getLogger(__name__)

_ASK_S = 10.0


def find_stale(vms: Iterable[VmRecord], now: datetime, after_s: float) -> list[VmRecord]:
    """The running VMs whose last use is longer ago than `after_s`; none where that is 0.

    The machine of a build is its call's, also while that is at work on the host.
    """
    if after_s <= 0:
        return []
    limit = now - timedelta(seconds=after_s)
    return [
        vm
        for vm in vms
        if vm.state == "running"
        and vm.paused is None
        and not vm.building
        and vm.touched_at
        and datetime.fromisoformat(vm.touched_at) < limit
    ]


async def stop_if_unused(ctx: VmContext, vm: VmRecord) -> bool:
    """Stop a stale VM unless its guest is in use, which touches it; whether it was stopped."""
    if not is_live(ctx, vm) or ctx.is_locked(vm.id):
        return False
    try:
        async with asyncio.timeout(_ASK_S):
            activity = await ctx.client(vm).activity()
    except (BangerError, TimeoutError) as e:
        log.warning("VM %s is not stopped: whether it is used is not known: %s", vm.name, e)
        return False
    if activity.streams or activity.sessions or activity.ssh:
        log.debug("VM %s is in use: %s", vm.name, activity)
        touch(ctx, vm)
        return False
    after = format_duration(ctx.settings.auto_stop_stale_after_s)
    why = f"nobody used it for {after} (auto_stop_stale_after)"
    stopped, note = await stop(ctx, vm, untouched_since=vm.touched_at, last_error=why)
    if stopped.state == "running":
        return False
    log.info("VM %s was stopped: %s%s", vm.name, why, f"; {note}" if note else "")
    return True


def touch(ctx: VmContext, vm: VmRecord) -> VmRecord:
    """Note that somebody uses a VM now: before the first wait of what does so, during which the
    guest knows nothing of it yet."""
    return ctx.store.update(vm.id, touched_at=now_text())
