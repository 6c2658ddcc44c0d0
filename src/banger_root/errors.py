"""The helper's one error: it crosses the socket as code, message, hint and reason."""

from __future__ import annotations

# The closed set of docs/protocol.md.
CODES = (
    "bad_version",
    "bad_request",
    "unknown_method",
    "unauthorized",
    "not_found",
    "already_exists",
    "not_running",
    "operation_failed",
)


class HelperError(Exception):
    """What was being done to which thing and why it failed, and the next command to type."""

    def __init__(
        self, code: str, message: str, *, hint: str | None = None, reason: str | None = None
    ) -> None:
        assert code in CODES
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.reason = reason
        self.also: list[str] = []
        """Failures of a rollback: attached, never put in place of the first failure."""

    def __str__(self) -> str:
        return "; ".join([self.message, *self.also])
