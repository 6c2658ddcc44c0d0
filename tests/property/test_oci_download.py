"""The download loop against servers that cut, ignore ranges, lie and garble, in any order."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.oci.download import BadDownload, download
from banger.oci.http import BrokenTransfer
from banger.oci.transfer import Meter

PIECE = 64 << 10
CONTENT = bytes(range(256)) * (PIECE // 64)  # four pieces
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass(frozen=True)
class Answer:
    """How one request is answered: `sent` bytes come, of the asked-for range or of everything."""

    sent: int = len(CONTENT)
    ranges: bool = True
    breaks: bool = False
    garbled: bool = False
    announced: int = 0
    """How much more than the truth is announced."""
    surplus: bytes = b""


@dataclass
class Server:
    answers: list[Answer]
    asked: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def ask(self, headers: Mapping[str, str]) -> Iterator[Any]:
        start = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.asked.append(start)
        a = self.answers.pop(0) if self.answers else Answer()
        begin = start if a.ranges else 0
        body = CONTENT[begin:]
        told = {"Content-Length": str(len(body) + a.announced)}
        if begin:
            told["Content-Range"] = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
        body = body[: a.sent] + a.surplus
        if a.garbled and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        pieces = [body[i : i + PIECE // 2] for i in range(0, len(body), PIECE // 2)]

        def read() -> bytes:
            if pieces:
                return pieces.pop(0)
            if a.breaks:
                raise BrokenTransfer("it broke")
            return b""

        yield SimpleNamespace(status=206 if begin else 200, headers=told, read=read)

    def pause_s(self, attempt: int) -> float:
        return float(attempt)

    def wait(self, seconds: float, why: str) -> None:
        self.waited.append(seconds)


def fetch(server: Server, target: io.BytesIO, told: list[int] | None = None) -> None:
    download(
        target,
        "https://server.invalid/x",
        size=len(CONTENT),
        sha256=SHA256,
        ask=server.ask,
        http=cast("Any", server),
        meter=Meter(len(CONTENT), lambda done, *_: None if told is None else told.append(done)),
        check=lambda: None,
    )


@given(
    st.lists(
        st.builds(
            Answer,
            sent=st.sampled_from([0, 1, PIECE - 1, PIECE, 2 * PIECE, len(CONTENT)]),
            ranges=st.booleans(),
            breaks=st.booleans(),
            garbled=st.booleans(),
            announced=st.sampled_from([0, 0, 0, 1, -1]),
            surplus=st.sampled_from([b"", b"", b"more"]),
        ),
        max_size=12,
    )
)
def test_whatever_servers_do_it_is_the_content_or_an_error(answers: list[Answer]) -> None:
    server, target = Server(list(answers)), io.BytesIO()
    told: list[int] = []
    try:
        fetch(server, target, told)
    except BadDownload:
        assert any(a.garbled or a.announced or a.surplus for a in answers)
    except BangerError as e:
        assert "https://server.invalid/x" in e.message
        assert len(server.waited) >= 4
    else:
        assert target.getvalue() == CONTENT
        assert told[-1] == len(CONTENT)
    assert len(target.getvalue()) <= len(CONTENT)
    assert all(0 <= at < len(CONTENT) for at in server.asked)


@given(st.lists(st.integers(PIECE, len(CONTENT) - 1), max_size=20))
def test_a_server_that_only_cuts_is_never_given_up(cuts: list[int]) -> None:
    server, target = Server([Answer(sent=n, breaks=True) for n in cuts]), io.BytesIO()
    fetch(server, target)
    assert target.getvalue() == CONTENT
    assert server.waited == []
    # Each request goes on where the one before broke.
    assert server.asked == sorted(set(server.asked))


def test_a_server_that_brings_nothing_is_given_up_with_growing_pauses() -> None:
    server = Server([Answer(sent=0)] * 9)
    with pytest.raises(BangerError, match="ended early, after 0B of 256K"):
        fetch(server, io.BytesIO())
    assert server.waited == [1, 2, 3, 4]


def test_what_was_stitched_from_two_versions_is_fetched_once_more() -> None:
    server, target = Server([Answer(sent=PIECE, garbled=True), Answer()]), io.BytesIO()
    fetch(server, target)
    assert server.asked == [0, PIECE, 0]
    assert target.getvalue() == CONTENT


def test_a_server_that_garbles_twice_is_refused() -> None:
    with pytest.raises(BadDownload, match="sends what has the sha256"):
        fetch(Server([Answer(garbled=True)] * 2), io.BytesIO())
