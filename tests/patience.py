"""How long tests wait for what has to happen. A watchdog: nothing is measured against it, so that
a machine that is busy with other things fails no test, and a test that hangs ends all the same.
"""

from __future__ import annotations

PATIENCE_S = 120.0
