"""The one error that crosses rooms: a code for programs, a sentence for people, the next command.

Rooms convert foreign errors into `BangerError` at their own edge, with `raise … from`. The RPC
edge logs it once, with the operation id.
"""

from __future__ import annotations

import errno
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


DISK_FULL_HINT = "df -h; banger image cache prune; banger vm prune"


def is_disk_full(e: BaseException | None) -> bool:
    """Whether a full disk of this host, or a quota, lies behind an error."""
    while e is not None:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(e, BangerError) and e.reason == "disk_full":
            return True
        e = e.__cause__
    return False


def find_disk_full(e: BaseException, *, doing: str = "") -> BangerError | None:
    """What to say of an error when a full disk lies behind it (reason disk_full); else None.

    A room that knows what it was doing says that itself; this is for the edges, where whatever a
    full disk broke passes: the working thread's, the daemon's, the command line's. `doing` is for
    errors that no room has put into words.
    """
    if not is_disk_full(e):
        return None
    if not isinstance(e, BangerError):
        place = f" ({e.filename})" if isinstance(e, OSError) and e.filename else ""
        message = f"{doing}{': ' if doing else ''}the host's disk is full{place}"
    elif e.reason is not None:
        return e
    else:
        told = any(words in e.message for words in ("No space", "quota exceeded", "disk is full"))
        message = e.message if told else f"{e.message}: the host's disk is full"
    explained = BangerError("operation_failed", message, hint=DISK_FULL_HINT, reason="disk_full")
    explained.__cause__ = e
    explained.outcome = e.outcome if isinstance(e, BangerError) else "unknown"
    if isinstance(e, BangerError):
        explained.also = e.also
    return explained


def explain_disk_full(e: BaseException) -> BaseException:
    """The error as it is; with a full disk behind it, the one that says so."""
    return find_disk_full(e) or e
