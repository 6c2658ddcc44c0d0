"""Events: lines that start with `@` and tell the runner outside what happens; the rest is log.

A scenario that wants the host's power cut tells a number with each step that must outlast it
(`told`), then asks for the cut. The runner boots the host anew from the same disk and gives it the
scenario again, with the last number that it was told (`before_the_cut`).
"""

from __future__ import annotations

import json
import sys

before_the_cut: int | None = None
"""The last number told before the power was cut; None in a host whose power was not."""


def emit(**event: object) -> None:
    """Write one event line."""
    sys.stdout.flush()
    print(f"@event {json.dumps(event)}", flush=True)
