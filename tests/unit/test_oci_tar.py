"""The tar reader and writer, judged by the standard library's; and damaged streams."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.oci.errors import BadImage
from banger.oci.tar_read import Member, TarReader, parse_number, parse_pax
from banger.oci.tar_write import write_end, write_member
from oci_kit import Entry, directory, layer_tar, link, symlink

ENTRIES = [
    directory("dir/", mode=0o1777),
    Entry("dir/file", content=b"content" * 200, mode=0o4755, uid=12, gid=34),
    Entry("deep/" * 30 + "long", content=b"x"),
    Entry("m" * 150, content=b"y"),
    symlink("sym", "t" * 140),
    link("hard", "dir/file"),
    Entry("chr", tarfile.CHRTYPE, device=(10, 200)),
    Entry("fifo", tarfile.FIFOTYPE),
    Entry("caf\u00e9", content=b"utf-8", mtime=2**31 + 5),
    Entry("ids", uid=3_000_000, gid=4_000_000_000),
    Entry("attr", xattrs={"user.a": b"1\n=", "security.capability": b"\1\0\0\2\xff"}),
]
FORMS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def read_all(data: bytes, size: int = 1 << 20) -> list[tuple[Member, bytes]]:
    reader = TarReader(chunks(data, size))
    found = []
    while (m := reader.next()) is not None:
        found.append((m, reader.data()))
    reader.drain()
    return found


def expected(data: bytes) -> list[tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return [
            (
                m.name, m.type, m.mode, m.uid, m.gid, m.linkname, int(m.mtime),
                (f.read() if m.isreg() and (f := tar.extractfile(m)) else b""),
                m.devmajor if m.ischr() else 0,
            )
            for m in tar
        ]  # fmt: skip


def seen(found: list[tuple[Member, bytes]]) -> list[tuple[object, ...]]:
    return [
        (
            m.name.decode(errors="surrogateescape").rstrip("/"), m.kind, m.mode, m.uid, m.gid,
            m.link.decode(errors="surrogateescape"), m.mtime, data, m.major,
        )
        for m, data in found
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 511, 513, 4096, 1 << 20])
def test_members_are_read_as_the_standard_library_reads_them(form: int, size: int) -> None:
    data = layer_tar(ENTRIES, form)
    assert seen(read_all(data, size)) == expected(data)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_reads_back_the_same(form: int) -> None:
    data = layer_tar(ENTRIES, form)
    out = io.BytesIO()
    for m, content in read_all(data):
        body = write_member(out.write, m, m.name)
        body.write(content)
        body.end()
    write_end(out.write)
    assert seen(read_all(out.getvalue())) == seen(read_all(data))
    assert expected(out.getvalue()) == expected(data)
    xattrs = {m.name: m.xattrs for m, _ in read_all(out.getvalue()) if m.xattrs}
    if form == tarfile.PAX_FORMAT:
        assert xattrs == {
            b"attr": ((b"user.a", b"1\n="), (b"security.capability", b"\1\0\0\2\xff"))
        }


def test_ustar_prefixes_are_part_of_the_name() -> None:
    data = layer_tar([Entry("p" * 80 + "/" + "n" * 90)], tarfile.USTAR_FORMAT)
    assert read_all(data)[0][0].name == b"p" * 80 + b"/" + b"n" * 90


def test_a_stream_cut_anywhere_is_an_error_or_ends_between_members() -> None:
    data = layer_tar(ENTRIES[:4])
    for cut in range(1, len(data), 97):
        try:
            read_all(data[:cut])
        except BadImage as e:
            assert "cut off" in str(e)
        else:
            assert cut % 512 == 0 or data[cut - cut % 512 :].strip(b"\0") == b""


@given(st.binary(max_size=2000))
def test_garbage_is_refused_not_believed(data: bytes) -> None:
    try:
        read_all(data)
    except BadImage:
        return
    assert not data or data[:512].strip(b"\0") == b""


def test_flipped_bytes_never_crash_the_reader() -> None:
    rng = random.Random(7)
    data = layer_tar(ENTRIES)
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(3):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            read_all(bytes(broken))
        except BadImage:
            continue


@given(st.integers(-(2**62), 2**62))
def test_numbers_in_base_256_are_read(value: int) -> None:
    field = bytearray(value.to_bytes(12, "big", signed=True))
    field[0] = 0x80 | (field[0] & 0x7F)
    assert parse_number(bytes(field)) == value


@pytest.mark.parametrize(
    "data",
    [b"5 a=\n" + b"99 x=y\n", b"x a=b\n", b"6 ab\n", b"-6 a=b\n", b"6 =bc\n", b"3 a\n", b"6 a=b."],
)
def test_a_damaged_pax_header_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        parse_pax(data)


def test_a_name_with_a_nul_is_refused() -> None:
    data = layer_tar([Entry("a\u00e9" + "b" * 110)]).replace(b"b" * 10, b"b" * 9 + b"\0", 1)
    with pytest.raises(BadImage, match="NUL"):
        read_all(data)


def sparse_member(text: bytes, stored: int | None = None) -> bytes:
    """GNU's format 1.0: the map in lines before the data."""
    info = tarfile.TarInfo("s")
    info.size = len(text) if stored is None else stored
    info.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 30),
    }  # fmt: skip
    return info.tobuf(tarfile.PAX_FORMAT) + text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"65536\n" + b"0" * (8 << 20), id="a number without an end"),
        pytest.param(b"65536\n" + b"0" * 511 + b"\n" + (b"0" * 511 + b"\n") * 8190, id="long"),
        pytest.param(b"0" * (8 << 20), id="a count without an end"),
    ],
)
def test_a_map_costs_no_more_than_its_length(text: bytes) -> None:
    began = time.process_time()
    with pytest.raises(BadImage, match="damaged|number|pieces"):
        read_all(sparse_member(text + bytes(-len(text) % 512)))
    assert time.process_time() - began < 2


def test_a_map_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(BadImage, match="cut off"):
        read_all(sparse_member(b"65536\n" + b"1\n" * 600, stored=1 << 60))


def test_many_pieces_are_read_in_a_moment() -> None:
    """As many as are believed, each of one byte."""
    count = 1 << 16
    text = b"%d\n" % count + b"".join(b"%d\n1\n" % (2 * i) for i in range(count))
    text += bytes(-len(text) % 512)
    began = time.process_time()
    [(member, data)] = read_all(sparse_member(text + b"x" * count + bytes(-count % 512),
                                              stored=len(text) + count))  # fmt: skip
    assert time.process_time() - began < 2
    assert (member.stored, len(data), len(member.sparse or ())) == (count, count, count)
    assert (member.sparse or ())[-1] == (2 * count - 2, 1)
