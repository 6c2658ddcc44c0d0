"""Operations: calls that the daemon carries out, how far each is, and how it ended."""

from __future__ import annotations

from typing import Any, Literal

from banger.api.base import Params, Wire
from banger.api.envelope import WireError

OperationState = Literal["running", "done", "failed", "unknown"]

REPEATABLE = frozenset(
    {
        "ping",
        "shutdown",
        "daemon.status",
        "daemon.doctor",
        "daemon.operations.list",
        "daemon.operations.show",
        "daemon.operations.cancel",
        "vm.list",
        "vm.show",
        "vm.stats",
        "vm.health",
        "vm.ping",
        "vm.ports",
        "vm.logs",
        "vm.connect",
        "vm.ssh",
        "vm.workspace.files",
        "vm.workspace.export",
        "vm.workspace.changes",
        "vm.acp.prepare",
        "vm.session.list",
        "vm.session.show",
        "image.list",
        "image.show",
        "image.export",
        "image.verify",
        "kernel.list",
        "kernel.show",
        "kernel.export",
        "kernel.catalog",
    }
)
"""Methods that change nothing, or to what a second call would change it, too. One whose answer is
lost may be asked again; every other one may have happened."""


class Operation(Wire, frozen=True, kw_only=True):
    """One call. `state`: `done`; `failed`: safe to retry; `unknown`: it may have happened.

    `stage` and `label` are the last that were told. `result` is the answer to a call with
    `detach`; `error` says why there is none. `cancellable`: False for what is carried through
    once it has begun.
    """

    id: str
    kind: str
    target: str
    state: OperationState
    stage: str = ""
    label: str = ""
    started_at: str
    ended_at: str | None = None
    cancellable: bool = True
    detached: bool = False
    """Nobody waits for it: it was asked for with `detach`."""
    result: Any | None = None
    error: WireError | None = None

    @property
    def done(self) -> bool:
        return self.state != "running"


class Detached(Wire, frozen=True, kw_only=True):
    """The answer to a call with `detach`: the work goes on under this id."""

    op_id: str


class OperationRef(Params, frozen=True, kw_only=True):
    id: str
