"""One file over HTTP into an open file: hashed on its way, bounded, resumed after breaks.

Holds nothing; what was written is the caller's to remove when it fails. Nobody looks into the
bytes before all of them have the hash that was promised.
"""

from __future__ import annotations

import hashlib
from typing import IO, TYPE_CHECKING

from banger.errors import BangerError
from banger.oci.http import BrokenTransfer, Response, place
from banger.oci.transfer import Meter, Stalled, Watch
from banger.units import format_size

if TYPE_CHECKING:
    from banger.disk.background import Job
    from banger.oci.http import Http

_LEAST_PROGRESS = 1 << 20
_FRUITLESS = 5
"""How often in a row asking for the rest may bring less than `_LEAST_PROGRESS`."""


def download(http: Http, url: str, target: IO[bytes], *, size: int, sha256: str, job: Job) -> None:
    """Write exactly the `size` bytes with this hash to the empty file `target`.

    Raises:
        BangerError: not_found; operation_failed: no answer, it breaks again and again, or (reason
            bad_bundle) more bytes, another announced size, another hash.
    """
    meter = Meter(size, job.advance)
    hasher = hashlib.sha256()
    have = fruitless = 0
    while have < size:
        before = have
        why = "the connection ended early"
        headers = {"Range": f"bytes={have}-"} if have else {}
        with http.request("GET", url, headers=headers) as answer:
            _judge(answer)
            if have and not _continues(answer, have):
                # It does not do ranges: from the start.
                target.seek(0)
                target.truncate()
                meter.add(-have)
                have, hasher = 0, hashlib.sha256()
            told = answer.headers.get("Content-Length", "")
            if told.isdigit() and int(told) != size - have:
                raise _bad(url, f"the server announces {told} bytes instead of {size - have}")
            watch = Watch()
            try:
                while piece := answer.read():
                    job.check()
                    have += len(piece)
                    if have > size:
                        raise _bad(url, f"it is longer than the {size} bytes that were announced")
                    hasher.update(piece)
                    target.write(piece)
                    meter.add(len(piece))
                    watch.saw(len(piece))
            except (BrokenTransfer, Stalled) as e:
                job.check()  # a cancellation breaks connections
                why = str(e)
        if have < size:
            fruitless = 0 if have - before >= _LEAST_PROGRESS else fruitless + 1
            if fruitless >= _FRUITLESS:
                raise BangerError(
                    "operation_failed",
                    f"fetching {place(url)}: {why}, after {format_size(have)} of "
                    f"{format_size(size)}",
                )
            if fruitless:
                http.wait(http.pause_s(fruitless), why)
    if hasher.hexdigest() != sha256:
        raise _bad(url, f"it has the sha256 {hasher.hexdigest()[:16]}…, not {sha256[:16]}…")


def read_document(http: Http, url: str, *, most: int) -> bytes:
    """The whole of a small file.

    Raises:
        BangerError: not_found; operation_failed: no answer, broken, or more than `most` bytes.
    """
    with http.request("GET", url) as answer:
        _judge(answer)
        try:
            return answer.text(most)
        except BrokenTransfer as e:
            raise BangerError("operation_failed", f"fetching {place(url)}: {e}") from e


def _judge(answer: Response) -> None:
    if answer.status in (200, 206):
        return
    missing = answer.status in (404, 410)
    raise BangerError(
        "not_found" if missing else "operation_failed",
        f"fetching {place(answer.url)}: "
        + ("there is no such file" if missing else f"it answers with status {answer.status}"),
    )


def _continues(answer: Response, offset: int) -> bool:
    """Whether an answer to a range request begins where it was asked to."""
    return answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
        f"bytes {offset}-"
    )


def _bad(url: str, problem: str) -> BangerError:
    return BangerError("operation_failed", f"fetching {place(url)}: {problem}", reason="bad_bundle")
