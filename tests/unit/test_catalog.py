"""Index, bundles and downloads: what is believed, what is refused, and what is left on the disk."""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import zstd
from banger.catalog import bundle as bundle_module
from banger.catalog.bundle import BadBundle, unpack_bundle, write_bundle
from banger.catalog.index import (
    Index,
    IndexEntry,
    bundle_name,
    format_index,
    publish_index,
    read_published,
    signature_path,
    with_entry,
)
from banger.catalog.published import Published, fetch_bundle, read_index
from banger.disk.background import Job
from banger.errors import BangerError
from banger.files import sha256_file
from banger.units import TIB
from fakes.signing import make_key
from fakes.web import Web, serving

KEY = make_key(bytes(range(32)))
SECOND = make_key(bytes(32))
NAMES = ("manifest.json", "rootfs.sqfs")


class Site:
    """A published directory with one image bundle, and a client that knows its keys."""

    def __init__(self, root: Path, web: Web) -> None:
        self.root, self.web = root, web
        self.index_file = web.root / "index.json"
        self.rootfs = bytes(range(256)) * 5000
        self.entry = self.publish_bundle({"manifest.json": b"{}", "rootfs.sqfs": self.rootfs})
        self.source = Published(
            url=f"{web.url}/index.json",
            keys=(KEY.public, SECOND.public),
            seen=root / "state" / "seen.json",
            reserve_bytes=0,
            first_pause_s=0.001,
        )
        self.target = root / "target"
        self.target.mkdir()
        self.publish()

    def publish_bundle(self, members: dict[str, Path | bytes], **changes: Any) -> IndexEntry:
        out = io.BytesIO()
        write_bundle(out.write, members, advance=lambda _: None)
        return self.publish_bytes(out.getvalue(), **changes)

    def publish_bytes(self, content: bytes, **changes: Any) -> IndexEntry:
        beside = self.web.root / "new"
        beside.write_bytes(content)
        sha256 = sha256_file(beside)
        file = bundle_name("img", "amd64", sha256)
        beside.rename(self.web.root / file)
        fields: dict[str, Any] = {
            "kind": "image", "name": "img", "distro": "debian", "arch": "amd64",
            "kernel_ref": "k", "file": file, "sha256": sha256, "size_bytes": len(content),
        }  # fmt: skip
        return IndexEntry(**{**fields, **changes})

    def publish(self, *, version: int = 1, days: int = 1, key: Any = KEY) -> None:
        index = with_entry(None, self.entry, days=days)
        publish_index(self.index_file, msgspec.structs.replace(index, version=version), key)

    def publish_raw(self, document: dict[str, Any]) -> None:
        """Signed as it should be, whatever it says."""
        from banger.minisign import sign

        data = json.dumps(document).encode()
        self.index_file.write_bytes(data)
        signature_path(self.index_file).write_text(sign(data, KEY))

    def read(self) -> Index:
        return read_index(self.source, Job())

    def fetch(self, entry: IndexEntry | None = None) -> frozenset[str]:
        return fetch_bundle(self.source, entry or self.entry, self.target, NAMES, Job())

    def refused(self, **changes: Any) -> BangerError:
        """The error of a fetch that leaves nothing unpacked and no downloaded file."""
        with pytest.raises(BangerError) as caught:
            self.fetch(msgspec.structs.replace(self.entry, **changes))
        assert list(self.target.iterdir()) == []
        return caught.value


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as web:
        yield Site(tmp_path, web)


# --- the index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, SECOND], ids=["first", "second"])
def test_an_index_signed_by_either_key_is_believed(site: Site, key: Any) -> None:
    site.publish(key=key)
    assert site.read().find("image", "img") == site.entry


def test_an_index_of_another_key_is_refused(site: Site) -> None:
    site.publish(key=make_key())
    with pytest.raises(BangerError, match="is signed with the key") as caught:
        site.read()
    assert caught.value.reason == "bad_index"


def test_an_index_with_a_flipped_byte_is_refused(site: Site) -> None:
    data = bytearray(site.index_file.read_bytes())
    data[data.index(b"debian")] ^= 1
    site.index_file.write_bytes(data)
    with pytest.raises(BangerError, match="does not fit"):
        site.read()


def test_a_lower_version_than_one_that_was_seen_is_refused(site: Site) -> None:
    site.publish(version=7)
    site.read()
    site.publish(version=7)
    site.read()
    site.publish(version=6)
    with pytest.raises(BangerError, match="version 6, and version 7 was seen") as caught:
        site.read()
    assert caught.value.reason == "bad_index"
    site.publish(version=8)
    assert site.read().version == 8


def test_an_unbelieved_index_is_not_remembered(site: Site) -> None:
    site.publish(version=900, key=make_key())
    with pytest.raises(BangerError):
        site.read()
    site.publish(version=1)
    assert site.read().version == 1


def test_a_damaged_memory_of_versions_is_an_error_and_no_amnesty(site: Site) -> None:
    site.read()
    site.source.seen.write_bytes(b"{")
    with pytest.raises(BangerError, match="which index was seen last"):
        site.read()


def test_an_expired_index_is_refused(site: Site) -> None:
    site.publish(days=-1)
    with pytest.raises(BangerError, match="it ended on"):
        site.read()
    # Its publisher can still read it, to renew it.
    assert read_published(site.index_file, (KEY.public,)).version == 1


def document(site: Site, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(site.index_file.read_bytes())
    return {**found, **changes}


def test_an_index_of_an_unknown_schema_is_refused_by_its_number(site: Site) -> None:
    site.publish_raw({"schema": 2, "what": "nobody knows"})
    with pytest.raises(BangerError, match="schema 2"):
        site.read()


def test_unknown_fields_of_an_index_are_ignored(site: Site) -> None:
    site.publish_raw(document(site, colour="blue"))
    assert site.read().version == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "../../etc/passwd"), ("file", "img-amd64-0000000000000000.tar.zst"),
        ("name", "../x"), ("arch", "a/b"), ("sha256", "AA"), ("size_bytes", 0),
        ("size_bytes", 9 << 30), ("kernel_ref", None), ("kind", "program"),
    ],
)  # fmt: skip
def test_an_entry_that_makes_no_sense_spoils_the_index(site: Site, field: str, value: Any) -> None:
    found = document(site)
    found["entries"][0][field] = value
    site.publish_raw(found)
    with pytest.raises(BangerError) as caught:
        site.read()
    assert caught.value.reason == "bad_index"


def test_an_entry_that_is_there_twice_spoils_the_index(site: Site) -> None:
    found = document(site)
    site.publish_raw({**found, "entries": found["entries"] * 2})
    with pytest.raises(BangerError, match="twice"):
        site.read()


@pytest.mark.parametrize("name", ["index.json", "index.json.minisig"])
def test_a_missing_index_or_signature_is_said_to_be_missing(site: Site, name: str) -> None:
    site.web.missing.add(name)
    with pytest.raises(BangerError, match=f"/{name}: there is no such file"):
        site.read()


def test_an_endless_index_is_not_read_to_its_end(site: Site) -> None:
    site.web.replaced["index.json"] = b" " * (5 << 20)
    with pytest.raises(BangerError, match="more than"):
        site.read()


def test_a_published_index_is_sorted_and_replaces_what_it_had(site: Site) -> None:
    other = msgspec.structs.replace(
        site.entry, name="aaa", file=bundle_name("aaa", "amd64", site.entry.sha256)
    )
    index = with_entry(with_entry(with_entry(None, site.entry), other), site.entry)
    assert index.version == 3
    names = [e["name"] for e in json.loads(format_index(index))["entries"]]
    assert names == ["aaa", "img"]
    left = index.find("image", "img")
    assert left == site.entry
    assert index.find("kernel", "img") is None
    days = datetime.datetime.fromisoformat(index.expires) - datetime.datetime.now(datetime.UTC)
    assert 89 <= days.days <= 90


# --- the download ---------------------------------------------------------------------------------


def test_a_bundle_comes_whole(site: Site) -> None:
    assert site.fetch() == {"manifest.json", "rootfs.sqfs"}
    assert (site.target / "rootfs.sqfs").read_bytes() == site.rootfs
    assert sorted(p.name for p in site.target.iterdir()) == ["manifest.json", "rootfs.sqfs"]


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without"])
def test_a_transfer_that_breaks_is_resumed(site: Site, ranges: bool) -> None:
    site.entry = site.publish_bundle(
        {"manifest.json": b"{}", "rootfs.sqfs": bytes(1 << 20) + os.urandom(100_000)}
    )
    site.web.ranges = ranges
    site.web.cut_after = site.entry.size_bytes * 2 // 3 if ranges else None
    site.fetch()
    asked = [line for line in site.web.asked if line.startswith("img")]
    assert len(asked) == (2 if ranges else 1)
    assert ("bytes=" in asked[-1]) is ranges


def test_a_server_without_ranges_that_always_cuts_is_given_up(site: Site) -> None:
    site.web.ranges, site.web.cut_after = False, site.entry.size_bytes - 1
    error = site.refused()
    assert error.code == "operation_failed"
    assert len([line for line in site.web.asked if line.startswith("img")]) == 5


def test_a_bundle_with_a_flipped_byte_is_refused_before_it_is_unpacked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((site.web.root / site.entry.file).read_bytes())
    data[len(data) // 2] ^= 1
    site.web.replaced[site.entry.file] = bytes(data)

    class Never:
        def __init__(self, *_: object) -> None:
            raise AssertionError("it is unpacked")

    monkeypatch.setattr(bundle_module, "_Content", Never)
    error = site.refused()
    assert error.reason == "bad_bundle"
    assert "sha256" in error.message


def test_a_longer_bundle_than_promised_is_refused(site: Site) -> None:
    data = (site.web.root / site.entry.file).read_bytes()
    site.web.replaced[site.entry.file] = data + b"x"
    assert "announces" in site.refused().message
    site.web.announce = len(data)  # a lie; then HTTP itself ends the body
    site.fetch()


def test_a_shorter_bundle_than_promised_is_refused(site: Site) -> None:
    data = (site.web.root / site.entry.file).read_bytes()
    site.web.replaced[site.entry.file] = data[:-1]
    assert "announces" in site.refused().message


def test_a_missing_bundle_is_said_to_be_missing(site: Site) -> None:
    site.web.missing.add(site.entry.file)
    assert site.refused().code == "not_found"


def test_a_server_with_a_hiccup_is_asked_again(site: Site) -> None:
    site.web.statuses = [503, 500]
    site.fetch()


def test_a_bundle_for_which_there_is_no_room_is_not_fetched(site: Site) -> None:
    site.source = msgspec.structs.replace(site.source, reserve_bytes=1000 * TIB)
    assert site.refused().reason == "disk_full"
    assert site.web.asked == []


# --- the bundle -----------------------------------------------------------------------------------


def tar_of(
    *members: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.USTAR_FORMAT
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(kind: bytes, name: str = "rootfs.sqfs", link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "content",
    [
        tar_of(("../rootfs.sqfs", b"x")),
        tar_of(("/rootfs.sqfs", b"x")),
        tar_of(("./rootfs.sqfs", b"x")),
        tar_of(("sub/rootfs.sqfs", b"x")),
        tar_of(("other", b"x")),
        tar_of(("rootfs.sqfs", b"x"), ("rootfs.sqfs", b"y")),
        tar_of(special(tarfile.SYMTYPE, link="/etc/passwd")),
        tar_of(special(tarfile.LNKTYPE, link="manifest.json")),
        tar_of(special(tarfile.DIRTYPE)),
        tar_of(special(tarfile.CHRTYPE)),
        tar_of(special(tarfile.FIFOTYPE)),
        tar_of((f"{'d' * 90}/{'e' * 60}/rootfs.sqfs", b"x")),
        tar_of((f"{'n' * 300}", b"x"), form=tarfile.GNU_FORMAT),
        tar_of((f"{'n' * 300}", b"x"), form=tarfile.PAX_FORMAT),
        tar_of(("rootfs.sqfs", b"x" * 5000))[:3000],
        tar_of(("rootfs.sqfs", b"x"))[:512],
        b"no tar at all" * 100,
        b"",
    ],
    ids=range(18),
)  # fmt: skip
def test_a_tar_that_is_no_bundle_is_refused_and_climbs_nowhere(
    tmp_path: Path, content: bytes
) -> None:
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    with pytest.raises(BadBundle):
        unpack(zstd.compress(content), target)
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(target)]
    assert outside == [tmp_path / "deep"]
    assert {p.name for p in target.iterdir()} <= {"rootfs.sqfs"}


def unpack(data: bytes, target: Path, *, room: int = 1 << 30) -> frozenset[str]:
    def require_space(size: int) -> None:
        if size > room:
            raise BangerError("operation_failed", "no room", reason="disk_full")

    return unpack_bundle(
        io.BytesIO(data), target, NAMES, require_space=require_space, check=lambda: None
    )


@pytest.mark.parametrize("data", [b"", b"no zstd", zstd.compress(b"x" * 2000)[:-5]])
def test_damaged_zstd_data_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadBundle, match=r"cut off|damaged"):
        unpack(data, tmp_path)


def test_a_decompression_bomb_is_asked_for_room_before_it_goes_off(tmp_path: Path) -> None:
    header = tarfile.TarInfo("rootfs.sqfs")
    header.size = 7 << 30
    bomb = zstd.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(BangerError, match="no room"):
        unpack(bomb, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 30}
    machine = zstd.ZstdCompressor(options=options)
    data = machine.compress(tar_of(("rootfs.sqfs", b"x"))) + machine.flush()
    with pytest.raises(BadBundle, match="damaged"):
        unpack(data, tmp_path)


@given(
    first=st.binary(max_size=3000),
    second=st.one_of(st.binary(max_size=3000), st.integers(0, 3 << 20).map(bytes)),
)
def test_what_goes_into_a_bundle_comes_out(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, second: bytes
) -> None:
    target = tmp_path_factory.mktemp("t")
    members: dict[str, Path | bytes] = {"manifest.json": first, "rootfs.sqfs": second}
    out = io.BytesIO()
    write_bundle(out.write, members, advance=lambda _: None)
    assert unpack(out.getvalue(), target) == set(NAMES)
    assert [(target / n).read_bytes() for n in NAMES] == [first, second]
    again = io.BytesIO()
    write_bundle(again.write, members, advance=lambda _: None)
    assert again.getvalue() == out.getvalue()


def test_a_bundle_is_a_tar_that_tar_reads(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"content" * 1000)
    file = tmp_path / "b.tar.zst"
    with file.open("wb") as f:
        write_bundle(
            f.write,
            {"manifest.json": b"{}", "rootfs.sqfs": tmp_path / "root"},
            advance=lambda _: None,
        )
    listed = subprocess.run(
        ["tar", "--zstd", "--numeric-owner", "-tvf", str(file)], capture_output=True, check=True
    ).stdout.decode()
    assert [line.split()[:3:2] for line in listed.splitlines()] == [
        ["-rw-r--r--", "2"], ["-rw-r--r--", "7000"],
    ]  # fmt: skip
    subprocess.run(["tar", "--zstd", "-xf", str(file), "-C", str(tmp_path)], check=True)
    assert (tmp_path / "rootfs.sqfs").read_bytes() == b"content" * 1000


def test_a_bundle_that_tar_wrote_is_read(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    data = subprocess.run(
        ["tar", "--zstd", "-C", str(tmp_path), "-c", *NAMES], capture_output=True, check=True
    ).stdout
    (tmp_path / "out").mkdir()
    assert unpack(data, tmp_path / "out") == set(NAMES)


def test_a_writer_that_stops_leaves_no_whole_stream() -> None:
    out = io.BytesIO()

    class Stopped(Exception):
        pass

    def stop(done: int) -> None:
        if done > 100_000:
            raise Stopped

    with pytest.raises(Stopped):
        write_bundle(out.write, {"a": bytes(10 << 20)}, advance=stop)
    machine = zstd.ZstdDecompressor()
    machine.decompress(out.getvalue())
    assert not machine.eof
