"""One body over HTTP into an open file: hashed on its way, bounded, resumed after breaks.

The one loop for whatever is fetched by its hash. Holds nothing; what was written is the caller's to
remove when it fails, and nobody looks into the bytes before all of them have the hash that was
promised.

Source: RFC 9110, section 14 (range requests).
"""

from __future__ import annotations

import hashlib
from typing import IO, TYPE_CHECKING

from banger.errors import BangerError
from banger.oci.http import BrokenTransfer, Http, Response, place
from banger.oci.transfer import Meter, Stalled, Watch
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

# Attempts in a row that bring next to nothing; one that brings something does not count.
_FRUITLESS = 5
_LEAST_PROGRESS = 64 << 10


class BadDownload(Exception):
    """What comes is not what was promised; the message goes on behind the sender's name."""


def download(
    target: IO[bytes],
    url: str,
    *,
    size: int,
    sha256: str,
    ask: Callable[[Mapping[str, str]], AbstractContextManager[Response]],
    http: Http,
    meter: Meter,
    check: Callable[[], None],
    hint: str | None = None,
) -> None:
    """Write exactly the `size` bytes with this hash (hex) to the empty file `target`.

    `ask` makes one request for `url` with these headers, and judges its status; `check` is called
    between two buffers and may raise to stop.

    Raises:
        BadDownload: more bytes, another announced size, twice another hash.
        BangerError: operation_failed, with `hint`: it breaks again and again. Whatever `ask` and
            `check` raise.
    """
    hasher = hashlib.sha256()
    have = fruitless = wrong = 0

    def start_again() -> None:
        nonlocal have, hasher
        target.seek(0)
        target.truncate()
        meter.add(-have)
        have, hasher = 0, hashlib.sha256()

    while have < size:
        check()
        before = have
        why = "the connection ended early"
        with ask({"Range": f"bytes={have}-"} if have else {}) as answer:
            if have and not _continues(answer, have):
                start_again()  # it does not do ranges
            told = answer.headers.get("Content-Length", "")
            # As text: a number may have more digits than anybody counts.
            if told.isascii() and told.isdigit() and (told.lstrip("0") or "0") != str(size - have):
                raise BadDownload(f"announces {told[:20]} bytes where {size - have} are expected")
            watch = Watch()
            try:
                while piece := answer.read():
                    check()
                    have += len(piece)
                    if have > size:
                        raise BadDownload(f"sends more than the {size} bytes that are expected")
                    hasher.update(piece)
                    target.write(piece)
                    meter.add(len(piece))
                    watch.saw(len(piece))
            except (BrokenTransfer, Stalled) as e:
                check()  # a cancellation breaks connections
                why = str(e)
        if have == size and hasher.hexdigest() != sha256:
            # Once more from the start: between two parts it may have been replaced.
            wrong += 1
            if wrong > 1:
                raise BadDownload(
                    f"sends what has the sha256 {hasher.hexdigest()[:16]}…, not {sha256[:16]}…"
                )
            start_again()
        elif have < size:
            fruitless = 0 if have - before >= _LEAST_PROGRESS else fruitless + 1
            if fruitless >= _FRUITLESS:
                raise BangerError(
                    "operation_failed",
                    f"fetching {place(url)}: {why}, after {format_size(have)} of "
                    f"{format_size(size)}",
                    hint=hint,
                )
            if fruitless:
                http.wait(http.pause_s(fruitless), why)


def _continues(answer: Response, offset: int) -> bool:
    """Whether an answer to a range request begins where it was asked to."""
    return answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
        f"bytes {offset}-"
    )
