"""The one error that crosses rooms: a code for programs, a sentence for people, the next command.

Rooms convert foreign errors into `BangerError` at their own edge, with `raise … from`. The RPC
edge logs it once, with the operation id.
"""

from __future__ import annotations

from typing import Literal

ErrorCode = Literal[
    "bad_version",
    "bad_request",
    "unknown_method",
    "unauthorized",
    "not_found",
    "already_exists",
    "not_running",
    "operation_failed",
]
# failed: nothing of it happened, or all of it was given back: safe to retry. unknown: it may have
# happened, in whole or in part, and a look is needed first.
Outcome = Literal["failed", "unknown"]


class BangerError(Exception):
    """A failure with a code of the closed set above.

    `message` says what was being done to which thing and why it failed; `hint` is the next command
    to type; `reason` refines the code for scripts (`memory_admission`, `connection_lost`, …).
    Failures of a rollback are attached in `also`, never put in place of the first failure.
    `outcome` says whether what was asked for may have happened all the same.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        hint: str | None = None,
        reason: str | None = None,
        outcome: Outcome = "failed",
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint
        self.reason = reason
        self.outcome: Outcome = outcome
        self.op_id: str | None = None
        self.also: list[str] = []

    def __str__(self) -> str:
        return "; ".join([self.message, *self.also])
