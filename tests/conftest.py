"""Settings of every test: a slow machine is no failure, so examples have no deadline of their own.

pytest's timeout ends a test that hangs.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("banger", deadline=None)
settings.load_profile("banger")
