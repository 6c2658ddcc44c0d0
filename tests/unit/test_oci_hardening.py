"""The classes of umoci's own unpack and hardening tests, each asked of our merge.

Where both accept a layer, umoci itself is the judge of the tree. Source: umoci's
oci/layer/*_test.go and test/{unpack,hardening}.bats. What each class is, and the test that
covers it:

    UnpackEntrySanitiseScoping      names that are absolute or climb  refused: test_oci_tree, BAD
    UnpackEntrySymlinkScoping       through links out of the root     test_links_out_of_the_root…
    UnpackEntryNonDirParent         an entry below a file             refused: test_oci_tree, BAD
    UnpackEntryParentDir            parents that no entry makes       test_oci_merge, `implied/deep`
    UnpackEntryWhiteout             whiteouts of all shapes           test_whiteouts_hide…
      EmptyWhiteoutName             whiteout of nothing               refused: test_oci_tree, BAD
      parent's times                                                  test_times_are_those…
    UnpackOpaqueWhiteout            links, nesting, several at once   test_opaque_directories…
    UnpackHardlink                  to files, to links, `/` targets   test_hard_links_share…
      targets that climb            refused: test_oci_tree, BAD
    UnpackEntryMap                  owners, also large ones           test_oci_merge, `ids`
    IsDirlink, keep-dirlinks        a directory where a link was      test_oci_merge, `s2d`
    CVE-2021-29136                  the root replaced by a link       test_the_root_stays…
    UnpackEntry_OverlayfsRootfs     does not apply: nothing unpacked here is an overlay
      its xattrs and whiteouts      in layers                         test_oci_tree, ACLs and labels
    ComplexXattr, MockedSELinux     xattrs that go, xattrs that stay  test_oci_tree, test_oci_merge
    LayerCompressionCheck, mixed compression                          test_each_layer_may_be…
    blob hash hardening             every blob of an image changed    test_a_blob_that_was_changed…
    descriptor size hardening       every blob longer or shorter      test_a_blob_that_was_changed…
    setuid, setcap, mknod           modes, capabilities, devices      test_oci_merge, `everything`
    consistent results              the same bytes each time          test_image_pull, same bytes
    UnpackManifestCustomLayer       layers of unknown types           told apart by their bytes
    UnpackStartFromDescriptor, MapRootless, config.json, raw unpack   do not apply
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from banger import zstd
from banger.disk.background import Job
from banger.errors import BangerError
from banger.oci.documents import ConfigFile, RunConfig, guest_config
from banger.oci.errors import BadImage
from banger.oci.layout import read_layout
from banger.oci.merge import index_layers
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

judged = [
    pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed"),
    pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="squashfs-tools is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to unpack owners and devices"),
]
pytestmark = judged


def trees(root: Path, *layers: list[Entry], **options: Any) -> list[dict[bytes, Any]]:
    """Our tree and umoci's."""
    layout = write_layout(root / "layout", build_image([layer_tar(x) for x in layers], **options))
    squash(layout, root / "x.sqfs")
    return [
        describe(unsquash(root / "x.sqfs", root / "ours")),
        describe(umoci_unpack(layout, root / "bundle")),
    ]


@pytest.mark.parametrize(
    "target", ["/", "/../", "/../../../../../..", "/./.././.././../", "..", "../..", "/etc/../.."]
)
def test_links_out_of_the_root_lead_to_the_root(tmp_path: Path, target: str) -> None:
    ours, theirs = trees(
        tmp_path,
        [directory("etc"), symlink("link", target)],
        [Entry("link/file", content=b"x"), Entry("link/etc/inner"), whiteout("link/nothing")],
    )
    assert ours == theirs
    assert {b"file", b"etc/inner"} <= set(ours)


_HIDDEN = ["rootpath", ".hiddenroot", "some/path/file", "another/path/.hiddenfile", "wh.x", ".wh"]


@pytest.mark.parametrize("name", _HIDDEN)
@pytest.mark.parametrize("is_directory", [False, True])
def test_whiteouts_hide_files_and_whole_directories(
    tmp_path: Path, name: str, is_directory: bool
) -> None:
    parents = [directory(p.as_posix()) for p in reversed(Path(name).parents) if p.name]
    below = [
        directory(name), Entry(f"{name}/file1"), directory(f"{name}/.sub"),
        Entry(f"{name}/.sub/file3"),
    ]  # fmt: skip
    ground = [*parents, *(below if is_directory else [Entry(name)]), Entry("other")]
    ours, theirs = trees(tmp_path, ground, [whiteout(name)])
    assert ours == theirs
    assert os.fsencode(name) not in ours and b"other" in ours


@pytest.mark.parametrize("first", [True, False])
def test_opaque_directories_hide_lower_layers_and_nothing_else(tmp_path: Path, first: bool) -> None:
    outside = "../" * 12 + "etc/shadow"
    ground = [
        directory("dir"), directory("dir/sub"), Entry("dir/old"), Entry("dir/sub/old"),
        symlink("dir/link", "../other"), symlink("dir/bad", outside), symlink("link", "dir"),
        directory("other"), Entry("other/kept"), directory("deep/er/most", mode=0o700),
        Entry("deep/er/most/x"), Entry("deep/kept"),
    ]  # fmt: skip
    upper = [Entry("dir/new"), symlink("dir/bad2", "/" + outside), directory("dir/sub"),
             Entry("dir/sub/new")]  # fmt: skip
    marks = [opaque("dir"), opaque("deep/er"), opaque("nothing/here")]
    ours, theirs = trees(tmp_path, ground, [*marks, *upper] if first else [*upper, *marks])
    assert ours == theirs
    assert {b"dir/new", b"dir/sub/new", b"dir/bad2", b"other/kept", b"deep/kept"} <= set(ours)
    assert not {b"dir/old", b"dir/sub/old", b"dir/link", b"dir/bad", b"deep/er/most"} & set(ours)


def test_hard_links_share_what_they_name_and_not_their_own_header(tmp_path: Path) -> None:
    ours, theirs = trees(
        tmp_path,
        [
            Entry("regular", content=b"c", mode=0o640, uid=3, gid=4),
            link("hard", "/regular", uid=1337, gid=2020, mode=0o640),
            symlink("sym", "../../../regular"),
            link("hard to sym", "sym"),
        ],
    )
    assert ours == theirs
    assert ours[b"hard"][-1] == (b"hard", b"regular")
    assert ours[b"hard to sym"][-1] == (b"hard to sym", b"sym")
    made = (tmp_path / "ours" / "regular").stat()
    assert (made.st_uid, made.st_gid) == (3, 4)


@pytest.mark.parametrize("name", [".", "./", "a/..", ""])
@pytest.mark.parametrize(
    "entry",
    [
        symlink("", "/etc"), Entry("", content=b"x"), Entry("", tarfile.CHRTYPE, device=(1, 3)),
        Entry("", tarfile.FIFOTYPE),
    ],
    ids=["link", "file", "device", "pipe"],
)  # fmt: skip
def test_the_root_stays_a_directory_whatever_a_layer_puts_there(
    tmp_path: Path, name: str, entry: Entry
) -> None:
    bad = Entry(name, entry.kind, entry.content, target=entry.target, device=entry.device)
    layers = [[directory("etc")], [bad, Entry("etc/passwd", content=b"ours")]]
    layout = write_layout(tmp_path / "layout", build_image([layer_tar(x) for x in layers]))
    try:
        squash(layout, tmp_path / "x.sqfs")
    except BangerError as e:
        assert e.reason == "bad_image"
        return
    tree = unsquash(tmp_path / "x.sqfs", tmp_path / "ours")
    assert tree.is_dir() and not tree.is_symlink()
    assert (tree / "etc/passwd").read_bytes() == b"ours"


def test_each_layer_may_be_compressed_in_its_own_way(tmp_path: Path) -> None:
    layers = [layer_tar([Entry(f"{n}", content=b"x" * 5000)]) for n in range(4)]
    stored = [layers[0], gzip.compress(layers[1]), layers[2], gzip.compress(layers[3])]
    layout = write_layout(tmp_path / "layout", build_image(layers, stored=stored))
    squash(layout, tmp_path / "x.sqfs")
    ours = describe(unsquash(tmp_path / "x.sqfs", tmp_path / "ours"))
    assert ours == describe(umoci_unpack(layout, tmp_path / "bundle"))
    assert len(ours) == 4


def _estargz(data: bytes) -> bytes:
    """As eStargz has it: one gzip member for each piece, the table of contents in the last."""
    pieces = [data[i : i + 1024] for i in range(0, len(data), 1024)]
    return b"".join(gzip.compress(piece) for piece in pieces)


def _zstd_chunked(data: bytes) -> bytes:
    """As zstd:chunked has it: several frames, then skippable ones with the table of contents."""
    pieces = [zstd.compress(data[i : i + 1024]) for i in range(0, len(data), 1024)]
    skippable = b"\x50\x2a\x4d\x18" + (9).to_bytes(4, "little") + b"toc-bytes"
    return skippable + b"".join(pieces) + skippable


@pytest.mark.parametrize("form", [_estargz, _zstd_chunked])
def test_layers_for_lazy_pulling_are_layers(tmp_path: Path, form: Any) -> None:
    layer = layer_tar(
        [
            Entry(".prefetch.landmark", content=b"\x0f"),
            directory("usr"),
            Entry("usr/big", content=os.urandom(50_000)),
            Entry("stargz.index.json", content=b"{}"),
        ]
    )
    layout = write_layout(
        tmp_path / "layout",
        build_image(
            [layer],
            stored=[form(layer)],
            annotations={
                "containerd.io/snapshot/stargz/toc.digest": "sha256:" + "0" * 64,
                "io.github.containers.zstd-chunked.manifest-position": "1:2:3:4",
            },
        ),
    )
    squash(layout, tmp_path / "x.sqfs")
    plain = write_layout(tmp_path / "plain", build_image([layer]))
    ours = describe(unsquash(tmp_path / "x.sqfs", tmp_path / "ours"))
    assert ours == describe(umoci_unpack(plain, tmp_path / "bundle"))


def test_times_are_those_of_the_layers_and_a_whiteout_changes_none(tmp_path: Path) -> None:
    ground = [
        directory("d", mtime=123), Entry("d/f", mtime=2**31 + 5), symlink("d/s", "f", mtime=0),
        Entry("d/gone", mtime=7), Entry("d/pipe", tarfile.FIFOTYPE, mtime=99),
    ]  # fmt: skip
    layout = write_layout(
        tmp_path / "layout", build_image([layer_tar(ground), layer_tar([whiteout("d/gone")])])
    )
    squash(layout, tmp_path / "x.sqfs")
    tree = unsquash(tmp_path / "x.sqfs", tmp_path / "ours")
    found = {p.name: int(os.lstat(p).st_mtime) for p in [tree / "d", *(tree / "d").iterdir()]}
    assert found == {"d": 123, "f": 2**31 + 5, "s": 0, "pipe": 99}


@pytest.mark.parametrize("change", ["same size", "longer", "shorter", "compressed anew"])
@pytest.mark.parametrize("part", ["manifest", "config", "layer 0", "layer 1"])
def test_a_blob_that_was_changed_is_refused_wherever_it_is(
    tmp_path: Path, part: str, change: str
) -> None:
    image = build_image([layer_tar([Entry("a", content=b"1" * 999)]), layer_tar([Entry("b")])])
    layout = write_layout(tmp_path / "layout", image)
    config = next(d for d in image.blobs if d != image.manifest and d not in image.layers)
    digests = {"manifest": image.manifest, "config": config}
    digests |= {f"layer {n}": digest for n, digest in enumerate(image.layers)}
    blob = layout / "blobs" / "sha256" / digests[part].removeprefix("sha256:")
    data = blob.read_bytes()
    match change:
        case "same size":
            blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "longer":
            blob.write_bytes(data + (b" " if data[:1] == b"{" else b"\0"))
        case "shorter":
            blob.write_bytes(data[:-1])
        case _ if part.startswith("layer"):
            # The diff_id fits, the digest does not.
            blob.write_bytes(gzip.compress(gzip.decompress(data), 9, mtime=1))
        case _:
            blob.write_bytes(data.replace(b":", b": ", 1))
    with pytest.raises(BangerError) as caught:
        index_layers(read_layout(layout, None).layers, what="test", work=Job())
    assert caught.value.reason == "bad_image"


@pytest.mark.parametrize("field", ["env", "cmd", "user"])
def test_a_configuration_of_many_words_is_refused(field: str) -> None:
    """It is kept with the image and listed with all others in one line, which has an end."""
    long = "x" * ((128 << 10) + 1)
    config = ConfigFile(config=RunConfig(**{field: long if field == "user" else (long,)}))
    with pytest.raises(BadImage, match="its configuration has"):
        guest_config(config, digest="", reference="")
    most = RunConfig(env=("PATH=/bin", "x" * 100_000))
    assert guest_config(ConfigFile(config=most), digest="", reference="").env[0] == "PATH=/bin"
