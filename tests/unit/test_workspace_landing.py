"""What a hostile guest can send: tars that lead elsewhere, lie about lengths, or end early."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.landing import Landing
from banger.workspace.tar_reader import TarReader, split_name


def _tar(*members: tuple[str, bytes, dict[str, object]], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _land(data: bytes, target: Path) -> None:
    reader = TarReader(io.BytesIO(data), "copying")
    with Landing(target, "copying") as landing:
        for member in reader:
            parts = split_name(member.name, "copying")
            if member.kind == "file":
                landing.file(parts, member.size, reader.read, mode=member.mode)
            elif member.kind == "symlink":
                landing.symlink(parts, member.link)
            elif member.kind == "hardlink":
                landing.hardlink(parts, split_name(member.link, "copying"))
            elif member.kind == "directory":
                landing.directory(parts)


LINK = {"type": tarfile.SYMTYPE, "linkname": ".."}


@pytest.mark.parametrize(
    "data",
    [
        _tar(("../evil", b"x", {})),
        _tar(("/tmp/evil", b"x", {})),
        _tar(("a/../../evil", b"x", {})),
        _tar(("link", b"", LINK), ("link/evil", b"x", {})),
        _tar(("link", b"", {**LINK, "linkname": "/"}), ("link/tmp/evil", b"x", {})),
        _tar(("hard", b"", {"type": tarfile.LNKTYPE, "linkname": "../secret"})),
        _tar(("l", b"", LINK), ("h", b"", {"type": tarfile.LNKTYPE, "linkname": "l/secret"})),
        _tar(("/".join("d" * 300), b"x", {})),
    ],
)
def test_nothing_lands_outside_of_the_directory(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    target = tmp_path / "t"
    target.mkdir()
    with pytest.raises(BangerError):
        _land(data, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "t"]
    assert (tmp_path / "secret").stat().st_nlink == 1
    assert not Path("/tmp/evil").exists()


def test_link_that_lies_there_already_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    target = tmp_path / "t"
    target.mkdir()
    (target / "file").symlink_to("../secret")
    (target / "dir").symlink_to("..")
    _land(_tar(("file", b"new", {})), target)
    assert (target / "file").read_text() == "new" and not (target / "file").is_symlink()
    with pytest.raises(BangerError, match="in the way"):
        _land(_tar(("dir/secret", b"new", {})), target)
    assert (tmp_path / "secret").read_text() == "s"


def test_cut_file_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    whole = _tar(("f", b"x" * 100_000, {}))
    for length in (600, 50_000, 100_000):
        with pytest.raises(BangerError):
            _land(whole[:length], tmp_path)
        assert (tmp_path / "f").read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_modes_and_links_are_read_as_they_were_written(form: int, tmp_path: Path) -> None:
    long = "d" * 40 + "/" + "n" * 50 if form == tarfile.USTAR_FORMAT else "d" * 80 + "/" + "n" * 90
    odd = 'odd \n"' if form == tarfile.USTAR_FORMAT else 'odd \n"\udcff' + "x" * 120
    if form == tarfile.PAX_FORMAT:
        odd = odd.replace("\udcff", "é")
    data = _tar(
        (long, b"long", {"mode": 0o755}),
        (odd, b"odd", {"mode": 0o4600}),
        ("l", b"", {"type": tarfile.SYMTYPE, "linkname": "x" * 90}),
        ("h", b"", {"type": tarfile.LNKTYPE, "linkname": long}),
        form=form,
    )
    _land(data, tmp_path)
    assert (tmp_path / long).read_bytes() == b"long"
    assert (tmp_path / long).stat().st_mode & 0o7777 == 0o755
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(odd))
    assert os.stat(path).st_mode & 0o7777 == 0o600
    assert os.readlink(tmp_path / "l") == "x" * 90
    assert (tmp_path / "h").stat().st_ino == (tmp_path / long).stat().st_ino


def _patch(data: bytes, at: int, value: bytes) -> bytes:
    block = bytearray(data)
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d[:300],
        lambda d: d[:700],
        lambda d: bytes([d[0] ^ 1]) + d[1:],
        lambda d: _patch(d, 124, b"99999999999"),
        lambda d: _patch(_patch(d, 156, b"L"), 124, b"77777777777"),
        lambda d: _patch(_patch(d, 156, b"x"), 124, b"00000000005"),
        lambda d: _patch(d, 0, b"\0" * 100),
    ],
)
def test_malformed_tar_is_an_error_and_takes_no_memory(spoil: Callable[[bytes], bytes]) -> None:
    reader = TarReader(io.BytesIO(spoil(_tar(("name", b"content", {})))), "copying")
    with pytest.raises(BangerError):
        for _ in reader:
            while reader.read(1 << 16):
                pass
