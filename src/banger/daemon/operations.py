"""The calls about operations: what is under way, how it goes on, and its end on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api import operations as o
    from banger.api import params as p
    from banger.daemon.daemon import Daemon
    from banger.rpc.operations import Entry
    from banger.rpc.server import Call


async def list_operations(daemon: Daemon, call: Call, _: p.Empty) -> list[o.Operation]:
    """What is under way, and what ended in the last ten minutes; oldest first."""
    assert daemon.server is not None
    return [row for row in daemon.server.operations.list() if row.id != call.op_id]


async def show(daemon: Daemon, call: Call, params: o.OperationRef) -> o.Operation:
    """The operation's progress until its end, and then the operation."""
    entry = _get(daemon, params.id)
    async for event in entry.follow():
        await call.event(event)
    return entry.record()


async def cancel(daemon: Daemon, call: Call, params: o.OperationRef) -> o.Operation:
    """Cancel it as its client's leaving would, and wait until all was given back.

    Raises:
        BangerError: not_found; reason unsupported: it is carried through once it has begun.
    """
    entry = _get(daemon, params.id)
    if entry.state == "running" and entry.finishes:
        raise BangerError(
            "operation_failed",
            f"{entry.kind} {entry.target}: what has begun to end a VM is carried through",
            hint=f"banger daemon operations show {entry.id}",
            reason="unsupported",
        )
    entry.cancel()
    async for _ in entry.follow():
        pass
    return entry.record()


def _get(daemon: Daemon, op_id: str) -> Entry:
    assert daemon.server is not None
    entry = daemon.server.operations.find(op_id)
    if entry is None:
        raise BangerError(
            "not_found",
            f"there is no operation {op_id!r}: what has ended is known for ten minutes",
            hint="banger daemon operations",
        )
    return entry
