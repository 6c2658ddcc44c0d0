"""Request and reply lines of protocol version 1 (docs/protocol.md)."""

from __future__ import annotations

from typing import Any

import msgspec

from banger.api.base import Wire
from banger.errors import BangerError, ErrorCode, Outcome

PROTOCOL_VERSION = 1


class Request(Wire, frozen=True, kw_only=True):
    version: int
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    op_id: str = ""
    token: str | None = None
    program: str | None = None  # the CLI's version, so that a daemon of another build says so
    state: str | None = None  # the CLI's state directory, so that it never sees another one's VMs


class WireError(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """A `BangerError` on a wire. `outcome` None: a peer that does not tell them apart."""

    code: ErrorCode
    message: str
    hint: str | None = None
    op_id: str | None = None
    reason: str | None = None
    outcome: Outcome | None = None

    @classmethod
    def of(cls, e: BangerError, op_id: str | None = None) -> WireError:
        return cls(
            code=e.code,
            message=str(e),
            hint=e.hint,
            op_id=op_id or e.op_id,
            reason=e.reason,
            outcome=e.outcome,
        )

    def exception(self) -> BangerError:
        e = BangerError(
            self.code,
            self.message,
            hint=self.hint,
            reason=self.reason,
            outcome=self.outcome or "failed",
        )
        e.op_id = self.op_id
        return e


class Reply(Wire, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of `result`, `error` and `stream` is set."""

    # Any other union with Raw is not decoded by msgspec; `convert` checks what comes out.
    result: Any = msgspec.UNSET
    error: WireError | None = None
    stream: bool = False
    op_id: str | None = None
    fds: int = 0
