"""Sparse files of any shape: sqfstar reads our layout of them, and the content is the same."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from banger.disk.background import Job
from banger.disk.squashfs import write_squashfs
from banger.oci.tar_read import REGULAR, Member
from banger.oci.tar_write import write_end, write_member

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed")

gaps = st.one_of(st.sampled_from([0, 1, 511, 512, 513, 4096]), st.integers(0, 150_000))
lengths = st.one_of(st.sampled_from([1, 3, 511, 512, 513, 4096, 131_072]), st.integers(1, 3000))


def member(size: int, pieces: tuple[tuple[int, int], ...] | None) -> Member:
    m = Member()
    m.ordinal, m.kind, m.mode, m.uid, m.gid, m.mtime = 0, REGULAR, 0o644, 0, 0, 0
    m.link, m.major, m.minor, m.xattrs = b"", 0, 0, ()
    m.size, m.sparse = size, pieces
    m.stored = size if pieces is None else sum(length for _, length in pieces)
    return m


@settings(max_examples=60)
@given(st.lists(st.tuples(gaps, lengths), max_size=4), gaps, st.integers(1, 5000))
@example([(1 << 20, 3)], 0, 1)
@example([(0, 5), (1 << 20, 3)], 0, 1)
@example([(32 << 10, 13)], 32 << 10, 1)
@example([], 300, 1)
@example([], 1001, 5000)
@example([(100, 7)], 20, 3)
def test_content_and_size_are_what_the_pieces_say(
    shape: list[tuple[int, int]], hole: int, step: int
) -> None:
    pieces: list[tuple[int, int]] = []
    at = 0
    for gap, length in shape:
        pieces.append((at + gap, length))
        at += gap + length
    size = at + hole
    content = bytearray(size)
    for offset, length in pieces:
        content[offset : offset + length] = b"x" * (length - 1) + b"y"
    data = b"".join(bytes(content[o : o + n]) for o, n in pieces)

    def feed(stream: object) -> None:
        write = stream.write  # type: ignore[attr-defined]
        body = write_member(write, member(size, tuple(pieces)), b"sparse")
        for start in range(0, len(data), step):
            body.write(data[start : start + step])
        body.end()
        body = write_member(write, member(4, None), b"zz")
        body.write(b"next")
        body.end()
        write_end(write)

    with tempfile.TemporaryDirectory() as place:
        image = Path(place) / "x.sqfs"
        write_squashfs(image, feed, job=Job(), epoch=None)
        for name, expected in (("sparse", bytes(content)), ("zz", b"next")):
            got = subprocess.run(["unsquashfs", "-cat", image, name], capture_output=True)
            assert got.stdout == expected
