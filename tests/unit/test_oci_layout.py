"""Images in files: which one is meant, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from banger.disk.background import Job
from banger.errors import BangerError
from banger.oci.documents import parse_manifest_or_index
from banger.oci.errors import BadImage
from banger.oci.layout import OciImage, read_docker_archive, read_layout
from banger.oci.merge import index_layers
from banger.oci.unpacked import unpacked_archive
from oci_kit import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    Entry,
    Image,
    build_image,
    layer_tar,
    sha256,
    write_archive,
    write_layout,
)


@pytest.fixture
def image() -> Image:
    return build_image([layer_tar([Entry("a", content=b"1")]), layer_tar([Entry("b")])])


def check(image: OciImage) -> None:
    assert index_layers(image.layers, what="test", work=Job()).content_bytes == 1


def saved(path: Path, *, link: bool = False, tags: tuple[str, ...] = ("team/app:v1",)) -> Path:
    """A tar as `docker save` writes it."""
    layers = [layer_tar([Entry("a", content=b"1")])] * 2
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"diff_ids": [sha256(x) for x in layers]},
        }
    ).encode()
    document = [
        {"Config": "c.json", "RepoTags": [tag], "Layers": ["0/layer.tar", "1/layer.tar"]}
        for tag in tags
    ]
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("c.json", config)
        add("0/layer.tar", layers[0])
        if link:
            info = tarfile.TarInfo("1/layer.tar")
            info.type, info.linkname = tarfile.SYMTYPE, "../0/layer.tar"
            tar.addfile(info)
        else:
            add("1/layer.tar", layers[1])
        add("manifest.json", json.dumps(document).encode())
    return path


def test_a_layout_and_its_archive_are_read(tmp_path: Path, image: Image) -> None:
    layout = write_layout(tmp_path / "layout", image)
    for path in (layout, write_archive(tmp_path / "a.tar", layout)):
        found = read_layout(path, None)
        assert found.digest == image.manifest
        check(found)


@pytest.mark.parametrize("link", [False, True])
def test_a_saved_image_is_read_also_where_layers_are_links(tmp_path: Path, link: bool) -> None:
    found = read_docker_archive(saved(tmp_path / "s.tar", link=link), None)
    assert index_layers(found.layers, what="test", work=Job()).survivors.count(1) == 1


def test_an_archive_that_is_compressed_as_a_whole_is_unpacked_for_the_time(tmp_path: Path) -> None:
    plain = saved(tmp_path / "s.tar")
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with unpacked_archive(packed, tmp_path / "scratch", "x", work=Job()) as path:
        assert read_docker_archive(path, "v1").layers
    assert list((tmp_path / "scratch").iterdir()) == []


def _tar(path: Path, *members: tuple[str, bytes | tuple[bytes, str]]) -> Path:
    """A tar of files, and of links where a member is (type, target)."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


_ONE = layer_tar([Entry("a", content=b"1")])
_CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": [sha256(_ONE)]}}
).encode()


def _manifest(layer: str, config: str = "c.json") -> tuple[str, bytes]:
    document = [{"Config": config, "RepoTags": None, "Layers": [layer]}]
    return "manifest.json", json.dumps(document).encode()


_LONG = "d/" * 60 + "layer.tar"


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([_manifest("l.tar"), ("c.json", _CONFIG), ("l.tar", _ONE)], id="first"),
        pytest.param(
            [("./c.json", _CONFIG), ("./l.tar", _ONE), ("./manifest.json", _manifest("l.tar")[1])],
            id="dot names",
        ),
        pytest.param(
            [
                ("x/layer.tar", _ONE),
                ("y/layer.tar", (tarfile.LNKTYPE, "x/layer.tar")),
                ("c.json", _CONFIG),
                _manifest("y/layer.tar"),
            ],
            id="hard link",
        ),
        pytest.param([(_LONG, _ONE), ("c.json", _CONFIG), _manifest(_LONG)], id="GNU long name"),
        pytest.param(
            [("l.tar", gzip.compress(_ONE)), ("c.json", _CONFIG), _manifest("l.tar")],
            id="compressed layer",
        ),
        pytest.param(
            [("l.tar", b"old"), ("l.tar", _ONE), ("c.json", _CONFIG), _manifest("l.tar")],
            id="written twice",
        ),
        pytest.param(
            # Docker 25 and later: a layout too, whose blobs the old documents name.
            [
                ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
                ("index.json", b'{"schemaVersion": 2, "manifests": []}'),
                ("blobs/", (tarfile.DIRTYPE, "")),
                ("blobs/sha256/c", _CONFIG),
                ("blobs/sha256/l", _ONE),
                _manifest("blobs/sha256/l", "blobs/sha256/c"),
                ("repositories", b"{}"),
            ],
            id="with blobs",
        ),
    ],
)
def test_saved_images_of_all_shapes_are_read(
    tmp_path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]
) -> None:
    check(read_docker_archive(_tar(tmp_path / "s.tar", *members), None))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("c.json", _CONFIG), _manifest("l.tar")], "no l.tar"),
        ([("l.tar", (tarfile.SYMTYPE, "../../etc/passwd")), ("c.json", _CONFIG),
          _manifest("l.tar")], "no l.tar"),
        ([("l.tar", (tarfile.SYMTYPE, "l.tar")), ("c.json", _CONFIG), _manifest("l.tar")],
         "no l.tar"),
        ([("l.tar", (tarfile.FIFOTYPE, "")), ("c.json", _CONFIG), _manifest("l.tar")], "no l.tar"),
        ([("l.tar", _ONE), ("c.json", _CONFIG), _manifest("l.tar", "/etc/passwd")], "no /etc"),
        ([("l.tar", _ONE + b"\0" * 512), ("c.json", _CONFIG), _manifest("l.tar")], "digest"),
        ([("manifest.json", b"[" * 9999)], "manifest.json"),
        ([("manifest.json", b"[]")], "no image"),
    ],
)  # fmt: skip
def test_saved_images_that_are_none_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]], words: str
) -> None:
    with pytest.raises(BangerError, match=words):
        check(read_docker_archive(_tar(tmp_path / "s.tar", *members), None))


def test_an_image_without_any_layer_may_say_null(tmp_path: Path) -> None:
    config = b'{"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": null}}'
    document = b'[{"Config": "c.json", "RepoTags": null, "Layers": null}]'
    path = _tar(tmp_path / "s.tar", ("c.json", config), ("manifest.json", document))
    assert read_docker_archive(path, None).layers == ()


def test_one_of_several_images_is_chosen_by_its_tag(tmp_path: Path) -> None:
    archive = saved(tmp_path / "s.tar", tags=("a:1", "b:2"))
    assert read_docker_archive(archive, "2").layers
    with pytest.raises(BangerError, match="there are 2 images"):
        read_docker_archive(archive, None)
    with pytest.raises(BangerError, match="no image 'x'") as caught:
        read_docker_archive(archive, "x")
    assert caught.value.code == "not_found"


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(BangerError) as caught:
        read_layout(tmp_path / "nothing.tar", None)
    assert caught.value.code == "not_found"


@pytest.mark.parametrize("damage", ["missing blob", "short blob", "changed manifest", "cut off"])
def test_a_damaged_layout_is_refused(tmp_path: Path, image: Image, damage: str) -> None:
    layout = write_layout(tmp_path / "layout", image)
    blobs = layout / "blobs" / "sha256"
    layer = blobs / image.layers[0].removeprefix("sha256:")
    path = layout
    if damage == "missing blob":
        layer.unlink()
    elif damage == "short blob":
        layer.write_bytes(layer.read_bytes()[:-1])
    elif damage == "changed manifest":
        manifest = blobs / image.manifest.removeprefix("sha256:")
        manifest.write_bytes(manifest.read_bytes().replace(b"gzip", b"gzap"))
    else:
        path = write_archive(tmp_path / "a.tar", layout)
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BangerError) as caught:
        check(read_layout(path, None))
    assert caught.value.reason == "bad_image"


def test_random_bytes_are_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"\x7fELF" * 1000)
    with pytest.raises(BangerError) as caught:
        read_layout(path, None)
    assert caught.value.reason == "bad_image"


_DESCRIPTOR = {"mediaType": CONFIG_TYPE, "digest": sha256(b""), "size": 1}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"manifests": [], "config": _DESCRIPTOR, "layers": []}, "neither"),
        ({}, "neither"),
        (
            {"config": {**_DESCRIPTOR, "mediaType": "application/helm"}, "layers": []},
            "no container",
        ),
        ({"config": {**_DESCRIPTOR, "digest": "md5:1"}, "layers": []}, "no sha256 digest"),
        ({"config": {**_DESCRIPTOR, "size": -1}, "layers": []}, "negative"),
        ({"config": _DESCRIPTOR, "layers": [_DESCRIPTOR] * 1001}, "1001 layers"),
        (
            {"config": _DESCRIPTOR, "layers": [{**_DESCRIPTOR, "mediaType": "x.tar+encrypted"}]},
            "encrypted",
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(document: dict[str, object], words: str) -> None:
    with pytest.raises(BadImage, match=words):
        parse_manifest_or_index(json.dumps(document).encode())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'"x"', b"[" * 100_000, b"\xff", b"{}" * (3 << 20)]
)
def test_a_document_that_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        parse_manifest_or_index(data)


def test_a_manifest_type_is_what_the_layout_says(image: Image) -> None:
    found = parse_manifest_or_index(image.blobs[image.manifest])
    assert found.media_type == MANIFEST_TYPE


@pytest.mark.parametrize("climbs", ["../outside.json", "a/../../outside.json", "absolute"])
def test_a_directory_names_no_file_outside_of_it(tmp_path: Path, climbs: str) -> None:
    """What `docker save` wrote, unpacked by somebody: its names are the image's, as in a tar."""
    outside = tmp_path / "outside.json"
    outside.write_text('{"os": "linux"}')
    (tmp_path / "saved/a").mkdir(parents=True)
    config = str(outside) if climbs == "absolute" else climbs
    document = json.dumps([{"Config": config, "Layers": []}])
    (tmp_path / "saved/manifest.json").write_text(document)
    with pytest.raises(BangerError) as refused:
        read_docker_archive(tmp_path / "saved", None)
    assert refused.value.reason == "bad_image"
    assert "outside" in refused.value.message
