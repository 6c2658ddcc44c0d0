"""Layers that hypothesis makes, merged by us and unpacked by umoci: one tree, entry by entry."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_kit import (
    Entry,
    build_image,
    describe,
    directory,
    layer_tar,
    link,
    opaque,
    squash,
    symlink,
    umoci_unpack,
    unsquash,
    whiteout,
    write_layout,
)

pytestmark = [
    pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed"),
    pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="squashfs-tools is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to unpack owners and devices"),
]

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def both(
    root: Path, layers: list[list[Entry]], *, form: int = tarfile.PAX_FORMAT, **options: Any
) -> tuple[dict[bytes, tuple[Any, ...]], dict[bytes, tuple[Any, ...]]]:
    """Our tree and umoci's."""
    image = build_image([layer_tar(entries, form) for entries in layers], **options)
    layout = write_layout(root / "layout", image)
    squash(layout, root / "ours.sqfs")
    ours = describe(unsquash(root / "ours.sqfs", root / "ours"))
    return ours, describe(umoci_unpack(layout, root / "bundle"))


# Few names, so that layers meet; each may be a file in one layer and a directory in the next.
_NAMES = st.sampled_from(["a", "b", "c", "lib"])


class Layers:
    """A random walk that keeps to what an unpacker accepts: it knows what is where."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.files: dict[str, str] = {}  # path → d, f or l
        self.serial = 0

    def layer(self) -> list[Entry]:
        entries: list[Entry] = []
        upper: set[str] = set()
        for _ in range(self.data.draw(st.integers(1, 7), label="entries")):
            entry = self.entry(upper)
            if entry is not None:
                entries.append(entry)
        return entries

    def entry(self, upper: set[str]) -> Entry | None:
        kind = self.data.draw(
            st.sampled_from(
                ["file", "file", "dir", "link", "symlink", "whiteout", "opaque", "fifo"]
            )
        )
        directories = ["", *[p for p, k in self.files.items() if k == "d"]]
        parent = self.data.draw(st.sampled_from(directories))
        name = self.data.draw(_NAMES)
        path = f"{parent}/{name}" if parent else name
        mode = self.data.draw(st.sampled_from([0o644, 0o4755, 0o1777, 0o600]))
        owner = self.data.draw(st.sampled_from([0, 7, 100_000]))
        self.serial += 1
        if kind == "opaque":
            if not parent:
                return None
            self._forget_below(parent, upper, itself=False)
            return opaque(parent)
        if kind == "whiteout":
            self._forget_below(path, upper, itself=True)
            return whiteout(path)
        if kind == "link":
            targets = [p for p, k in self.files.items() if k == "f" and p != path]
            if not targets or self.files.get(path) == "d":
                return None
            self._set(path, "f", upper)
            return link(path, self.data.draw(st.sampled_from(targets)), mode=0o644)
        if kind == "dir":
            self._set(path, "d", upper)
            return directory(path, mode=mode | 0o111, uid=owner, gid=owner)
        if self.files.get(path) == "d":
            self._forget_below(path, set(), itself=True)
        if kind == "symlink":
            self._set(path, "l", upper)
            return symlink(path, self.data.draw(st.sampled_from(["a", "/b", "../c", "none"])))
        # Hard links share owner and mode: as a link's own header is written here.
        self._set(path, "f", upper)
        if kind == "fifo":
            return Entry(path, tarfile.FIFOTYPE, mode=0o644)
        return Entry(path, content=f"{self.serial}".encode() * (self.serial % 5), mode=0o644)

    def _set(self, path: str, kind: str, upper: set[str]) -> None:
        self.files[path] = kind
        parts = path.split("/")
        upper.update("/".join(parts[: i + 1]) for i in range(len(parts)))

    def _forget_below(self, path: str, upper: set[str], *, itself: bool) -> None:
        for known in list(self.files):
            inside = known.startswith(path + "/") or (itself and known == path)
            if inside and known not in upper:
                del self.files[known]


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_random_layers_make_the_tree_that_umoci_makes(data: st.DataObject) -> None:
    walk = Layers(data)
    layers = [walk.layer() for _ in range(data.draw(st.integers(1, 4), label="layers"))]
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = both(Path(place), layers)
    assert ours == theirs


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.binary(min_size=1, max_size=40).filter(
            lambda n: not {0, 0x2F} & set(n) and n not in (b".", b"..") and n[:4] != b".wh."
        ),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_any_bytes_make_a_name(names: list[bytes], form: int) -> None:
    # A name of blanks at its end is fine for us and for the kernel; pax keeps it, so does GNU.
    entries = [Entry(b"d/" + name, content=name) for name in names]
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = both(Path(place), [[directory("d"), *entries]], form=form)
    assert ours == theirs
    assert len(ours) == len(names) + 1


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_everything_that_a_layer_can_hold_arrives(tmp_path: Path, compression: str) -> None:
    first = [
        directory("./", mode=0o711), directory("usr"), directory("usr/lib"), directory("dev"),
        symlink("lib", "usr/lib"), symlink("abs", "/usr/lib"), symlink("up", "../../../usr"),
        Entry("usr/lib/a", content=b"x" * 1000, mode=0o4755, uid=5, gid=7),
        link("usr/lib/b", "usr/lib/a", mode=0o4755, uid=5, gid=7),
        link("usr/lib/c", "/usr/lib/a", mode=0o4755, uid=5, gid=7),
        Entry("dev/null", tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        Entry("dev/sda", tarfile.BLKTYPE, device=(8, 0), mode=0o660),
        Entry("pipe", tarfile.FIFOTYPE), Entry(b"caf\xe9", content=b"latin"),
        Entry("n" * 120 + "/" + "m" * 200, content=b"long"),
        symlink("long-target", "t/" * 200),
        Entry("cap", xattrs={"security.capability": CAPABILITY, "user.x": b"\xff\x00\n="}),
        directory("with-xattr", xattrs={"user.d": b"1", "trusted.t": b"2"}),
        directory("gone"), Entry("gone/x"), directory("opq"), Entry("opq/x"),
        Entry("big", content=bytes(300_000) + b"end"),
        Entry("ids", uid=3_000_000, gid=4_000_000_000),
        Entry("t", content=b"old"), link("t2", "t"), directory("d2f"), Entry("d2f/x"), Entry("f2d"),
        symlink("s2d", "usr"), directory("sticky", mode=0o1777), Entry("empty"),
    ]  # fmt: skip
    second = [
        # Through links: merged-/usr, absolute, and climbing ones.
        Entry("lib/via-link", content=b"1"), Entry("abs/via-abs", content=b"2"),
        Entry("up/via-up", content=b"3"),
        whiteout("gone"), Entry("opq/new", content=b"n"), opaque("opq"),
        Entry("t", content=b"new"), link("cross", "usr/lib/a", mode=0o4755, uid=5, gid=7),
        Entry("d2f", content=b"file"), directory("f2d"), Entry("f2d/in"),
        directory("s2d", mode=0o700), Entry("s2d/in"), whiteout("nothing"), whiteout("no/where"),
        directory("with-xattr", xattrs={"user.other": b"3"}),
        Entry("after", content=b"stays"), whiteout("after"),
    ]  # fmt: skip
    third = [
        whiteout("usr/lib/a"), Entry("implied/deep/file"), directory("usr", mode=0o711, uid=9),
        opaque("sticky"), Entry("dangling/x"),
    ]  # fmt: skip
    ours, theirs = both(tmp_path, [first, second, third], compression=compression)
    assert ours == theirs
    assert ours[b"usr/lib/b"][-1] == (b"cross", b"usr/lib/b", b"usr/lib/c")
    assert (tmp_path / "ours").stat().st_mode & 0o7777 == 0o711


def test_a_zstd_layer_is_the_same_tree(tmp_path: Path) -> None:
    layers = [layer_tar([directory("d"), Entry("d/f", content=b"z" * 100_000)])]
    trees = []
    for kind in ("gzip", "zstd"):
        layout = write_layout(tmp_path / kind, build_image(layers, compression=kind))
        squash(layout, tmp_path / f"{kind}.sqfs")
        trees.append(describe(unsquash(tmp_path / f"{kind}.sqfs", tmp_path / f"{kind}.tree")))
    assert trees[0] == trees[1]


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0", "gnu"])
def test_sparse_files_keep_content_and_size(tmp_path: Path, version: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as f:
        for offset in range(0, 40 << 20, 3 << 20):
            f.seek(offset)
            f.write(b"data" * 2000)
        f.truncate(50 << 20)
    with (source / "hole").open("wb") as f:
        f.truncate(2 << 30)
    form = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    tar = subprocess.run(
        ["tar", "-cS", *form, "-C", source, "sparse", "hole"], check=True, capture_output=True
    ).stdout
    layout = write_layout(tmp_path / "layout", build_image([tar]))
    squash(layout, tmp_path / "x.sqfs")
    listed = subprocess.run(
        ["unsquashfs", "-lln", tmp_path / "x.sqfs"], check=True, capture_output=True, text=True
    ).stdout
    assert f" {2 << 30} " in listed
    content = subprocess.run(
        ["unsquashfs", "-cat", tmp_path / "x.sqfs", "sparse"], check=True, capture_output=True
    ).stdout
    assert content == (source / "sparse").read_bytes()


def test_a_directory_of_8000_entries_arrives(tmp_path: Path) -> None:
    # sqfstar looks through a directory for each new name: 65,000 take it half a minute.
    entries = [directory("d"), *(Entry(f"d/{i:05}") for i in range(8_000))]
    layout = write_layout(tmp_path / "layout", build_image([layer_tar(entries)]))
    assert squash(layout, tmp_path / "x.sqfs").members == 8_001
    listed = subprocess.run(
        ["unsquashfs", "-l", tmp_path / "x.sqfs"], check=True, capture_output=True
    ).stdout
    assert listed.count(b"squashfs-root/d/") == 8_000
