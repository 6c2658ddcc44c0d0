"""Settings of every test. A slow machine is no failure: examples have no deadline of their own, and
pytest's timeout ends only what hangs.

Examples are the same in every run, so that what passes here passes there. With BANGER_SOAK set they
are new ones each time, and more of them where a test says so.
"""

from __future__ import annotations

import os

from hypothesis import settings

from sample import SEED, SEED_OF_THE_DAY

settings.register_profile(
    "banger", deadline=None, derandomize="BANGER_SOAK" not in os.environ, print_blob=True
)
settings.load_profile("banger")


def pytest_report_header() -> str:
    return f"fault matrices: BANGER_SEED={SEED}, of real VMs BANGER_SEED={SEED_OF_THE_DAY}"
