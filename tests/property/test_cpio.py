"""cpio archives: what is written is read back, and every archive starts where a kernel looks."""

from __future__ import annotations

import contextlib
import io
import stat

from hypothesis import given
from hypothesis import strategies as st

from banger.disk.cpio import Member, Writer, append_member, read_members

names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
        lambda part: part not in (".", "..")
    ),
    min_size=1,
    max_size=4,
).map("/".join)
members = st.builds(
    Member,
    name=names,
    mode=st.integers(0, 0o7777).map(lambda mode: stat.S_IFREG | mode),
    content=st.binary(max_size=300),
    rdev=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)


@given(
    st.lists(members, max_size=8), st.lists(st.tuples(names, st.binary(max_size=50)), max_size=3)
)
def test_members_are_read_back_from_all_archives_of_a_stream(
    written: list[Member], appended: list[tuple[str, bytes]]
) -> None:
    stream = io.BytesIO()
    writer = Writer(stream)
    for member in written:
        writer.add(member)
    assert writer.finish() == len(stream.getvalue())
    for name, content in appended:
        append_member(stream, name, content)
        assert len(stream.getvalue()) % 4 == 0
    stream.seek(0)
    found = list(read_members(stream))
    assert found[: len(written)] == written
    assert [(m.name, m.content) for m in found[len(written) :]] == appended


@given(st.binary(max_size=400))
def test_foreign_bytes_are_refused_with_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        list(read_members(io.BytesIO(data)))


@given(st.lists(members, min_size=1, max_size=3), st.data())
def test_an_archive_that_is_cut_off_is_never_taken_for_a_whole_one(
    written: list[Member], data: st.DataObject
) -> None:
    stream = io.BytesIO()
    writer = Writer(stream)
    for member in written:
        writer.add(member)
    whole = stream.getvalue()
    cut = data.draw(st.integers(1, len(whole) - 1))
    found: list[Member] = []
    with contextlib.suppress(ValueError):
        found.extend(read_members(io.BytesIO(whole[:cut])))
    assert found == written[: len(found)]
    assert len(found) < len(written) or cut > len(whole) - 4
