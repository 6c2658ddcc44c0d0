"""Base types of everything that crosses a wire.

msgspec inherits `frozen` and `forbid_unknown_fields`, not `kw_only`: every subclass repeats it, and
a contract test checks that each does.
"""

from __future__ import annotations

import msgspec


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """A document that accepts unknown fields: envelopes, records and results of newer peers."""


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document that refuses unknown fields: whatever asks for something to be done."""
