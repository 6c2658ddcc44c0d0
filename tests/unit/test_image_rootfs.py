"""The filter between a fresh root and an image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from banger.image.rootfs import Addition, RootStats, filter_root, is_left_out

OLD, BUILD, EPOCH = 1_500_000_000, 1_700_000_500, 1_700_000_000


def entry(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mtime: int = OLD,
    link: str = "",
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime, info.linkname = kind, len(content), mtime, link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o640
    info.uid, info.gid, info.uname = 33, 4, "www-data"
    return info, content


def pack(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def run(source: bytes, additions: dict[str, Addition] | None = None) -> dict[str, tarfile.TarInfo]:
    """The members that come out, by name; the content is in `pax_headers["content"]`."""
    target = io.BytesIO()
    filter_root(
        io.BytesIO(source),
        target,
        additions or {},
        stats=RootStats(),
        check=lambda: None,
        aside=io.BytesIO(),
        built_after=BUILD,
        epoch=EPOCH,
    )
    target.seek(0)
    found = {}
    with tarfile.open(fileobj=target) as tar:
        for info in tar:
            data = tar.extractfile(info) if info.isreg() else None
            info.pax_headers = {**info.pax_headers, "content": data.read().decode() if data else ""}
            found[info.name] = info
    return found


def test_names_lose_the_dot_and_the_root_itself_is_left_out() -> None:
    found = run(pack(entry("./", kind=tarfile.DIRTYPE), entry("./etc", kind=tarfile.DIRTYPE)))
    assert list(found) == ["etc", "etc/machine-id"]


def test_owner_mode_and_content_pass_through() -> None:
    info = run(pack(entry("./srv/a", b"data")))["srv/a"]
    assert (info.uid, info.gid, info.mode, info.uname) == (33, 4, 0o640, "")
    assert info.pax_headers["content"] == "data"


def test_files_of_packages_keep_their_time_and_files_of_this_build_get_a_fixed_one() -> None:
    found = run(pack(entry("./old", mtime=OLD), entry("./new", mtime=BUILD + 3)))
    assert (found["old"].mtime, found["new"].mtime) == (OLD, EPOCH)


@pytest.mark.parametrize(
    "name",
    [
        "dev/null", "proc/1", "run/lock/x", "tmp/x", "etc/hostname", "etc/resolv.conf",
        "etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_ed25519_key.pub", "var/lib/apt/lists/x",
        "var/cache/apt/archives/x.deb", "var/lib/dbus/machine-id",
        "etc/apt/apt.conf.d/99mmdebstrap",
    ],
)  # fmt: skip
def test_what_belongs_to_the_build_or_to_one_machine_is_left_out(name: str) -> None:
    assert is_left_out(name)


@pytest.mark.parametrize(
    "name",
    [
        "dev", "tmp", "var/lib/apt/lists", "etc/hostname.d/x", "etc/ssh/sshd_config",
        "var/lib/dpkg/status", "var/lib/dpkg/info/x.list", "device/x", "etc/apt/sources.list",
        "root/.bashrc", "usr/share/doc/x/copyright",
    ],
)  # fmt: skip
def test_what_belongs_to_the_system_stays(name: str) -> None:
    assert not is_left_out(name)


def test_machine_id_is_there_and_empty() -> None:
    assert run(pack(entry("./etc/machine-id", b"0123\n")))["etc/machine-id"].size == 0


def test_logs_are_emptied_and_keep_their_owner() -> None:
    info = run(pack(entry("./var/log/dpkg.log", b"installed x\n")))["var/log/dpkg.log"]
    assert (info.size, info.gid) == (0, 4)


def test_hard_links_keep_their_target() -> None:
    found = run(pack(entry("./a", b"x"), entry("./b", kind=tarfile.LNKTYPE, link="./a")))
    assert (found["b"].type, found["b"].linkname) == (tarfile.LNKTYPE, "a")


def test_a_file_whose_first_name_is_left_out_is_kept_under_its_next() -> None:
    def link(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
        return entry(name, kind=tarfile.LNKTYPE, link=to)

    members = (
        entry("./boot/other", b"other"),
        entry("./tmp/a", b"content"),
        link("./tmp/b", "./tmp/a"),
        link("./kept", "./tmp/b"),
        link("./again", "./tmp/a"),
        link("./third", "./kept"),
        entry("./added", b"replaced"),
        link("./linked", "./added"),
    )
    found = run(pack(*members), {"added": Addition(mode=0o644, content=b"new")})
    assert {name: (i.type, i.linkname, i.pax_headers["content"]) for name, i in found.items()} == {
        "kept": (tarfile.REGTYPE, "", "content"),
        "again": (tarfile.LNKTYPE, "kept", ""),
        "third": (tarfile.LNKTYPE, "kept", ""),
        "linked": (tarfile.REGTYPE, "", "replaced"),
        "added": (tarfile.REGTYPE, "", "new"),
        "etc": (tarfile.DIRTYPE, "", ""),
        "etc/machine-id": (tarfile.REGTYPE, "", ""),
    }
    assert (found["kept"].mode, found["kept"].uid) == (0o640, 33)


def test_a_hard_link_to_what_never_came_is_an_error() -> None:
    source = pack(entry("./b", kind=tarfile.LNKTYPE, link="./tmp/a"))
    with pytest.raises(ValueError, match="b is a hard link to tmp/a"):
        run(source)


def test_an_absolute_symlink_is_kept_as_it_is() -> None:
    found = run(pack(entry("./etc/x", kind=tarfile.SYMTYPE, link="/usr/x")))
    assert found["etc/x"].linkname == "/usr/x"


def test_attributes_that_squashfs_can_hold_stay_and_others_go() -> None:
    info, content = entry("./ping", b"x")
    info.pax_headers = {
        "SCHILY.xattr.security.capability": "cap",
        "SCHILY.xattr.system.posix_acl_access": "acl",
        "mtime": "1500000000.25",
    }
    headers = run(pack((info, content)))["ping"].pax_headers
    assert headers["SCHILY.xattr.security.capability"] == "cap"
    assert not any("acl" in key for key in headers)


def test_an_added_file_replaces_the_packages_and_belongs_to_root(tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("ours")
    found = run(
        pack(entry("./etc", kind=tarfile.DIRTYPE), entry("./etc/motd", b"theirs")),
        {"etc/motd": Addition(mode=0o600, content=tmp_path / "motd")},
    )
    assert found["etc/motd"].pax_headers["content"] == "ours"
    assert (found["etc/motd"].uid, found["etc/motd"].mode) == (0, 0o600)


def test_an_added_file_brings_the_directories_it_lacks() -> None:
    found = run(pack(entry("./a")), {"opt/b/c": Addition(mode=0o644, content=b"x")})
    assert list(found)[-4:] == ["etc/machine-id", "opt", "opt/b", "opt/b/c"]


def test_an_added_file_does_not_go_through_a_link() -> None:
    source = pack(entry("./bin", kind=tarfile.SYMTYPE, link="usr/bin"))
    with pytest.raises(ValueError, match="/bin is no directory"):
        run(source, {"bin/x": Addition(mode=0o755, content=b"")})


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "./a/../../b"])
def test_a_name_that_climbs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="holds the name"):
        run(pack(entry(name)))


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a twice"):
        run(pack(entry("./a", b"1"), entry("a", b"2")))


@pytest.mark.parametrize("source", [b"", pack()])
def test_an_empty_root_is_no_image(source: bytes) -> None:
    with pytest.raises((ValueError, tarfile.TarError)):
        run(source)


def test_a_member_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(tarfile.TarError):
        run(pack(entry("./a", b"x" * 100_000))[:50_000])
