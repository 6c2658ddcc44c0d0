"""Events: lines that start with `@` and tell the runner outside what happens; the rest is log."""

from __future__ import annotations

import json
import sys


def emit(**event: object) -> None:
    """Write one event line."""
    sys.stdout.flush()
    print(f"@event {json.dumps(event)}", flush=True)
