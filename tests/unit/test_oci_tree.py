"""The tree that layers make: names that climb, limits, and what is hidden by what."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.oci.layout import read_layout
from banger.oci.merge import LayerIndex, index_layers, write_merged
from oci_kit import (
    Entry,
    build_image,
    directory,
    layer_tar,
    link,
    opaque,
    squash_image,
    symlink,
    whiteout,
    write_layout,
)

BAD = [
    pytest.param(Entry("../etc/passwd"), "climbs", id="name climbs"),
    pytest.param(Entry("a/../../b"), "climbs", id="name climbs inside"),
    pytest.param(Entry("x" * 300), "more than 255", id="long component"),
    pytest.param(link("h", "../outside"), "climbs", id="hard link climbs"),
    pytest.param(link("h", "nowhere"), "not there", id="hard link to nothing"),
    pytest.param(link("h", "dir"), "directory", id="hard link to a directory"),
    pytest.param(link("h", "./"), "root directory", id="hard link to the root"),
    pytest.param(Entry(".wh."), "no whiteout", id="whiteout of nothing"),
    pytest.param(Entry("dir/.wh..."), "no whiteout", id="whiteout of .."),
    pytest.param(Entry("file/below"), "is a file", id="below a file"),
    pytest.param(Entry("loop/below"), "too many symbolic links", id="link loop"),
]


def index(tmp_path: Path, *layers: list[Entry]) -> LayerIndex:
    layout = write_layout(tmp_path / "layout", build_image([layer_tar(x) for x in layers]))
    return index_layers(read_layout(layout, None).layers, what="test", work=Job())


def merged(tmp_path: Path, *layers: list[Entry]) -> dict[str, tarfile.TarInfo]:
    """What the merge writes, as the standard library reads it, in order."""
    out = io.BytesIO()
    write_merged(index(tmp_path, *layers), out, what="test", work=Job())
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {m.name: m for m in tar}


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_a_hostile_entry_is_refused_with_the_reason(tmp_path: Path, bad: Entry, words: str) -> None:
    ground = [directory("dir"), Entry("file"), symlink("loop", "loop2"), symlink("loop2", "loop")]
    with pytest.raises(BangerError, match=words) as caught:
        index(tmp_path, ground, [bad])
    assert caught.value.reason == "bad_image"


def test_an_absolute_name_is_refused(tmp_path: Path) -> None:
    data = bytearray(layer_tar([Entry("xetc/passwd")]))
    data[0:1] = b"/"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    layout = write_layout(tmp_path / "layout", build_image([bytes(data)]))
    with pytest.raises(BangerError, match="absolute"):
        index_layers(read_layout(layout, None).layers, what="test", work=Job())


def test_absolute_and_climbing_links_are_data(tmp_path: Path) -> None:
    found = merged(tmp_path, [symlink("a", "/etc/shadow"), symlink("b", "../../../x")])
    assert [m.linkname for m in found.values()] == ["/etc/shadow", "../../../x"]


def test_what_goes_through_a_link_stays_below_the_root(tmp_path: Path) -> None:
    ground = [directory("etc"), symlink("out", "../../../../etc"), symlink("abs", "/")]
    found = merged(tmp_path, ground, [Entry("out/a"), Entry("abs/b")])
    assert {"etc/a", "b"} <= set(found)


def test_directories_come_first_and_links_behind_their_targets(tmp_path: Path) -> None:
    found = list(merged(tmp_path, [link("z/a", "z/t"), Entry("z/t"), directory("z")]))
    assert found[0] == "z"
    assert set(found[1:]) == {"z/a", "z/t"}


def test_a_link_outlives_its_target(tmp_path: Path) -> None:
    found = merged(tmp_path, [Entry("t", content=b"data"), link("kept", "t")], [whiteout("t")])
    assert list(found) == ["kept"]
    assert found["kept"].isreg() and found["kept"].size == 4


def test_links_resolve_in_their_own_layer(tmp_path: Path) -> None:
    found = merged(
        tmp_path,
        [Entry("t", content=b"old"), link("old", "t")],
        [Entry("t", content=b"newer"), link("new", "t")],
    )
    sizes = {name: m.size for name, m in found.items() if m.isreg()}
    assert sorted(sizes.values()) == [3, 5]
    links = {name: m.linkname for name, m in found.items() if m.islnk()}
    assert links == {"new": "t"} or links == {"t": "new"}


@pytest.mark.parametrize("hiding", [[opaque("d"), Entry("d/new")], [Entry("d/new"), opaque("d")]])
def test_an_opaque_directory_hides_lower_layers_only(tmp_path: Path, hiding: list[Entry]) -> None:
    found = merged(tmp_path, [directory("d"), Entry("d/old"), directory("d/sub")], hiding)
    assert set(found) == {"d", "d/new"}


def test_a_whiteout_of_what_this_layer_brought_does_nothing(tmp_path: Path) -> None:
    found = merged(tmp_path, [Entry("a")], [link("b", "a"), whiteout("b"), whiteout("a")])
    assert set(found) == {"b"}


def test_sockets_are_left_out_and_counted(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job()
    job.warn = told.append  # type: ignore[method-assign]
    layout = write_layout(
        tmp_path / "layout", build_image([layer_tar([Entry("s", b"s"), Entry("f")])])
    )
    found = index_layers(read_layout(layout, None).layers, what="test", work=job)
    assert found.survivors.count(0) == 1
    assert told == ["test: socket left out, 1 of them"]


def test_acls_and_labels_are_left_out(tmp_path: Path) -> None:
    xattrs = {
        "user.kept": b"1",
        "system.posix_acl_access": b"\2\0\0\0",
        "security.selinux": b"label",
        "trusted.overlay.opaque": b"y",
    }
    found = merged(tmp_path, [Entry("f", xattrs=xattrs), directory("d", xattrs=xattrs)])
    for m in found.values():
        kept = [k for k in m.pax_headers if k.startswith("SCHILY.xattr.")]
        assert kept == ["SCHILY.xattr.user.kept"]


def test_a_directory_of_65000_entries_is_merged(tmp_path: Path) -> None:
    header = bytearray(layer_tar([Entry("d/00000")])[:512])
    header[148:156] = b" " * 8
    members = []
    for i in range(65_000):
        header[2:7] = b"%05d" % i
        members.append(bytes(header[:148]) + b"%06o\0 " % sum(header) + bytes(header[156:]))
    data = b"".join(members) + bytes(1024)
    layout = write_layout(tmp_path / "layout", build_image([data]))
    found = index_layers(read_layout(layout, None).layers, what="test", work=Job())
    assert found.survivors.count(0) == 65_000


def test_more_names_than_memory_has_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.oci.tree._MOST_MEMORY", 100_000)
    with pytest.raises(BangerError, match="too many files"):
        index(tmp_path, [Entry(f"{i}") for i in range(1000)])


def test_memory_is_given_back_for_what_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.oci.tree._MOST_MEMORY", 100_000)
    same = [directory("d"), *(Entry(f"d/{i}") for i in range(200))]
    layers = [same, same, [whiteout("d")], same, [opaque("d")], same, same]
    assert index(tmp_path, *layers).survivors.count(6) == 200


def test_the_distribution_is_read_from_the_image(tmp_path: Path) -> None:
    entries = [directory("usr/lib"), Entry("usr/lib/os-release", content=b'A=1\nID="alpine"\n')]
    layout = write_layout(tmp_path / "layout", build_image([layer_tar(entries)]))
    pytest.importorskip("banger.disk.squashfs")
    assert squash_image(read_layout(layout, None), tmp_path / "x.sqfs").distro == "alpine"


def test_an_empty_image_is_an_empty_tree(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", build_image([b"", bytes(1024)]))
    assert squash_image(read_layout(layout, None), tmp_path / "x.sqfs").members == 0


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_holes_that_no_disk_could_hold_are_refused(tmp_path: Path, form: str) -> None:
    """A bomb that unpacks to nothing: a few bytes, and a file of three quarters of a TiB, twice."""
    with (tmp_path / "a").open("wb") as f:
        f.truncate(3 << 38)
    (tmp_path / "b").write_bytes(b"")
    os.truncate(tmp_path / "b", 3 << 38)
    tar = subprocess.run(
        ["tar", "-cS", f"--format={form}", "-C", tmp_path, "a", "b"],
        check=True,
        capture_output=True,
    ).stdout
    assert len(tar) < 100_000
    layout = write_layout(tmp_path / "layout", build_image([tar]))
    with pytest.raises(BangerError, match="more than 1 TiB"):
        index_layers(read_layout(layout, None).layers, what="test", work=Job())


_DEEP = "/".join(["d" * 250] * 15)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(
            [link(f"h{i}", "t" * 90) for i in range(1000)], id="links to what never comes"
        ),
        pytest.param(
            [
                *(directory(f"d{i}") for i in range(10)),
                *(directory(f"d{i}", xattrs={"user.x": b"x" * 30_000}) for i in range(10)),
            ],
            id="attributes that come later",
        ),
        pytest.param(
            [directory(f"d{i}", xattrs={"user." + "k" * 30_000: b"x"}) for i in range(10)],
            id="names of attributes",
        ),
        pytest.param(
            [Entry(f"{_DEEP}/f"), *(link(f"{_DEEP}/{i}", f"{_DEEP}/f") for i in range(200))],
            id="paths of links",
        ),
    ],
)
def test_everything_that_is_remembered_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Entry]
) -> None:
    monkeypatch.setattr("banger.oci.tree._MOST_MEMORY", 200_000)
    with pytest.raises(BangerError, match="too many files"):
        index(tmp_path, entries)


def test_links_that_waited_cost_no_more_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("banger.oci.tree._MOST_MEMORY", 100_000)
    layers = [[*(link(f"{n}h{i}", "t") for i in range(20)), Entry("t")] for n in range(5)]
    assert len(index(tmp_path, *layers).tree.root.entries) == 101


def test_siblings_at_the_end_of_a_long_path_do_not_hold_a_copy_of_it_each(tmp_path: Path) -> None:
    entries = [symlink("s", _DEEP), directory(_DEEP), *(directory(f"s/{i}") for i in range(2000))]
    found = index(tmp_path, entries)
    tracemalloc.start()
    assert sum(1 for _ in found.tree.walk_directories()) == 2015
    found.tree.survivors()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_path_that_no_program_could_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="more than 4095"):
        index(tmp_path, [symlink("s", _DEEP), Entry(f"s/{_DEEP}/f")])
