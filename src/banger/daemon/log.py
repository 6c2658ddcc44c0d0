"""The daemon's log: JSON lines with the operation id, in a bounded file or in the journal."""

from __future__ import annotations

import json
import logging
import logging.handlers
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from banger.rpc.server import current_op

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES = 4 << 20
# What the journal takes from the beginning of a line: sd-daemon(3).
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "op": current_op.get(),
            "where": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class JournalLines(JsonLines):
    """The same with the priority in front, which the journal takes off."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelname, 6)}>{super().format(record)}"


def start_logging(path: Path | None, level: str) -> None:
    """Send all records to `path`, two files of 4 MiB at most; None: to stderr, for the journal."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler()
        handler.setFormatter(JournalLines())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=1)
        handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # It writes addresses with their queries, in which registries put signatures.
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
