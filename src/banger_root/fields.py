"""JSON from outside, before it means anything: documents of bounded size, fields of exact type.

Pure, and the same for requests and for ledger files. What a field means is for `validate` to say.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from banger_root.errors import HelperError

LINE_LIMIT = 1 << 20
DEPTH_LIMIT = 8


def parse_document(line: bytes) -> dict[str, Any]:
    """A JSON object of bounded size and depth, without duplicate keys.

    Raises:
        HelperError: bad_request.
    """
    if len(line) > LINE_LIMIT:
        raise HelperError("bad_request", f"the request is longer than {LINE_LIMIT} bytes")
    try:
        text = line.decode("utf-8")
        # Before parsing: the parser would recurse as deep as it is told to.
        if _depth(text) > DEPTH_LIMIT:
            raise HelperError("bad_request", f"the request nests deeper than {DEPTH_LIMIT}")
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except ValueError as e:
        raise HelperError("bad_request", f"the request is no JSON: {e}") from e
    if type(document) is not dict:
        raise HelperError("bad_request", "the request is no JSON object")
    return document


def bool_at(value: Any, field: str) -> bool:
    """True or false, and nothing that means it.

    Raises:
        HelperError: bad_request.
    """
    if type(value) is not bool:
        refuse(field, "true or false", value)
    return value


def number_at(value: Any, field: str, least: int, most: int) -> int:
    """A whole number in a range, ends included.

    Raises:
        HelperError: bad_request.
    """
    # `type() is`: True is no number here.
    if type(value) is not int or not least <= value <= most:
        refuse(field, f"a number from {least} to {most}", value)
    return value


def object_at(value: Any, field: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        HelperError: bad_request.
    """
    if type(value) is not dict:
        refuse(field, "an object", value)
    return value


def exactly(fields: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    """All of the known fields and no other.

    Raises:
        HelperError: bad_request.
    """
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise HelperError("bad_request", f"{where} has the unknown field {shown(unknown[0])}")
    for name in known:
        if name not in fields:
            raise HelperError("bad_request", f"{where} lacks the field {name}")


def refuse(field: str, rule: str, value: Any) -> NoReturn:
    """The one way in which a value is refused.

    Raises:
        HelperError: bad_request.
    """
    raise HelperError("bad_request", f"{field} must be {rule}, not {shown(value)}")


def shown(value: Any) -> str:
    """A value for an error message: what came from outside is quoted, escaped and cut."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _depth(text: str) -> int:
    """How deep the brackets outside strings nest."""
    deepest = depth = 0
    inside = escaped = False
    for c in text:
        if inside:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                inside = False
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest
