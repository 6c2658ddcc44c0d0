"""Files of a static web server: bundles by their hash, small documents whole.

Holds nothing; what was written is the caller's to remove when it fails.
"""

from __future__ import annotations

import contextlib
from typing import IO, TYPE_CHECKING

from banger.errors import BangerError
from banger.oci.download import BadDownload, download
from banger.oci.http import BrokenTransfer, Response, place
from banger.oci.transfer import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from banger.disk.background import Job
    from banger.oci.http import Http


def fetch_file(
    http: Http, url: str, target: IO[bytes], *, size: int, sha256: str, job: Job
) -> None:
    """Write exactly the `size` bytes with this hash to the empty file `target`.

    Raises:
        BangerError: not_found; operation_failed: no answer, it breaks again and again, or (reason
            bad_bundle) more bytes, another announced size, another hash.
    """

    @contextlib.contextmanager
    def ask(headers: Mapping[str, str]) -> Iterator[Response]:
        with http.request("GET", url, headers=headers) as answer:
            _judge(answer)
            yield answer

    try:
        download(
            target,
            url,
            size=size,
            sha256=sha256,
            ask=ask,
            http=http,
            meter=Meter(size, job.advance),
            check=job.check,
        )
    except BadDownload as e:
        raise BangerError(
            "operation_failed", f"fetching {place(url)}: the server {e}", reason="bad_bundle"
        ) from e


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
