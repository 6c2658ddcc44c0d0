"""Sessions of a guest without processes: a table that answers as the agent does."""

from __future__ import annotations

from typing import Any


class GuestSessions:
    """What `session.start, list, show, kill, stop, remove` are answered with."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Any]] = {}

    def answer(self, verb: str, params: dict[str, Any]) -> dict[str, Any]:
        if verb == "list":
            return {"result": {"sessions": list(self._records.values())}}
        name = params["name"]
        record = self._records.get(name)
        if verb == "start":
            if record is not None:
                return _error("already_exists", f"there is a session {name}")
            self._records[name] = record = _record(name, params["argv"])
        elif record is None:
            return _error("not_found", f"there is no session {name}")
        elif verb in ("kill", "stop"):
            record.update(state="exited", code=None, signal="KILL", ended_unix_ns=2)
        elif verb == "remove":
            if record["state"] == "running":
                return _error("operation_failed", f"the session {name} runs")
            del self._records[name]
            return {"result": {}}
        return {"result": record}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _record(name: str, argv: list[str]) -> dict[str, Any]:
    return {
        "id": name, "name": name, "argv": argv, "cwd": "/root", "user": "root",
        "stdin_mode": "detached", "tty": False, "tags": [], "state": "running", "pid": 7,
        "code": None, "signal": "", "reason": "", "created_unix_ns": 1, "started_unix_ns": 1,
        "ended_unix_ns": 0, "attached": False,
    }  # fmt: skip
