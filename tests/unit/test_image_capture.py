"""From a guest's system to an image: the real agent sends, sqfstar writes, unsquashfs judges."""

from __future__ import annotations

import io
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.api.records import ImageConfig
from banger.config.paths import Paths
from banger.disk.background import Job, JobCancelled
from banger.disk.identity import identify
from banger.errors import BangerError
from banger.image.capture import NewImage, capture_image, decide
from banger.image.entries import (
    ROOTFS,
    ImageManifest,
    get_image,
    list_images,
    verify_image,
    write_manifest,
)
from banger.image.furnish import Lines
from banger.oci.errors import BadImage
from banger.oci.live import LiveTar
from banger.rpc.trees import GuestFiles
from banger.units import TIB
from fakes.agent import TOKEN, Agent, running_agent
from oci_kit import Entry, describe, directory, layer_tar, link, unsquash

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for owners and devices")


class Guest(GuestFiles):
    """The agent of this host, whose system is a directory of the test."""

    def __init__(self, agent: Agent, root: Path) -> None:
        super().__init__(agent.connect, _request)
        self._root = root

    def capture(self, *args: Any, **options: Any) -> Any:
        return super().capture(*args, **options, path=str(self._root))


class Sent(GuestFiles):
    """A guest that sends these bytes."""

    def __init__(self, stream: bytes) -> None:
        self._stream = stream

    def capture(self, exclude: Any, enter: Any, receive: Any, **options: Any) -> Any:
        return receive(iter([self._stream]))


def _request(method: str, params: dict[str, Any]) -> Request:
    return Request(
        version=PROTOCOL_VERSION, method=method, params=msgspec.Raw(msgspec.json.encode(params)),
        token=TOKEN,
    )  # fmt: skip


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(
        state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "run",
        config_file=tmp_path / "config.toml",
    )  # fmt: skip
    store(paths, "base")
    return paths


def store(paths: Paths, name: str, **fields: Any) -> None:
    place = paths.images / (name.encode().hex() * 32)[:32]
    place.mkdir(parents=True)
    (place / ROOTFS).write_bytes(b"base")
    known = identify(place / ROOTFS)
    write_manifest(
        place,
        ImageManifest(
            name=name, distro="debian", arch="amd64", kernel_ref="k", rootfs_file=ROOTFS,
            rootfs_sha256=known.sha256, rootfs_bytes=known.size_bytes,
            rootfs_mtime_ns=known.mtime_ns, **fields,
        ),
    )  # fmt: skip


def wanted(paths: Paths, **changes: Any) -> NewImage:
    fields: dict[str, Any] = {
        "name": "new", "base": get_image(paths, "base"), "distro": "debian", "kernel_ref": "k2",
        "features": ("docker",), "recipe": None, "optional_missing": ("mise",),
        "description": "made", "disk_bytes": 1 << 20, "replaced": None, "reserve_bytes": 0,
    }  # fmt: skip
    return NewImage(**{**fields, **changes})


def make_system(root: Path) -> None:
    for name in (
        "etc/ssh", "tmp", "proc", "var/log/journal/1", "var/lib/banger/s", "var/cache/apt",
        "root/.ssh", "usr/bin", "empty",
    ):  # fmt: skip
        (root / name).mkdir(parents=True)
    for name in (
        "etc/hostname", "etc/ssh/ssh_host_rsa_key", "etc/ssh/sshd_config", "etc/machine-id",
        "tmp/x", "var/log/messages", "var/log/journal/1/j", "var/lib/banger/s/log",
        "var/cache/apt/pkgcache.bin", "root/.ssh/authorized_keys", "usr/bin/tool",
    ):  # fmt: skip
        (root / name).write_text(name)
    (root / "link").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"odd\xff\n")).write_bytes(b"")
    (root / "usr/bin/again").hardlink_to(root / "usr/bin/tool")
    (root / ("n" * 200)).write_text("long")
    with (root / "sparse").open("wb") as f:
        f.truncate(64 << 20)
        f.seek(32 << 20)
        f.write(b"in the middle")
    os.mkfifo(root / "pipe")
    os.chmod(root, 0o711)


LEFT_OUT = {
    b"etc/hostname", b"etc/ssh/ssh_host_rsa_key", b"tmp/x", b"var/log/journal/1",
    b"var/log/journal/1/j", b"var/lib/banger", b"var/lib/banger/s", b"var/lib/banger/s/log",
    b"var/cache/apt/pkgcache.bin",
}  # fmt: skip


@needs_root
def test_a_system_becomes_an_image_as_it_is(agent: Agent, paths: Paths, tmp_path: Path) -> None:
    root = tmp_path / "system"
    root.mkdir()
    make_system(root)
    os.chown(root / "usr/bin/tool", 1234, 3_000_000)
    os.chmod(root / "usr/bin/tool", 0o4755)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(root / "usr", "user.note", b"a\0b")
    os.setxattr(root / "etc", "trusted.note", b"kept")
    made = capture_image(paths, Guest(agent, root), wanted(paths), Job())
    assert (made.name, made.kernel_ref, made.features) == ("new", "k2", ("docker",))
    assert (made.optional_missing, made.recipe, made.oci) == (("mise",), None, None)
    assert verify_image(paths, "new") == ()
    tree = unsquash(Path(made.rootfs_path), tmp_path / "tree")
    for name in ("var/log/messages", "etc/machine-id"):
        (root / name).write_bytes(b"")
    expected = {name: row for name, row in describe(root).items() if name not in LEFT_OUT}
    assert describe(tree) == expected
    assert stat.S_IMODE(tree.stat().st_mode) == 0o711
    assert Path(made.rootfs_path).stat().st_size < 1 << 20


def test_how_the_base_is_run_is_kept_but_not_what_it_was_pulled_as(
    agent: Agent, paths: Paths, tmp_path: Path
) -> None:
    (tmp_path / "system").mkdir()
    config = ImageConfig(env=("A=b",), cmd=("run",), digest="sha256:1", reference="r/x:1")
    store(paths, "pulled", oci=config, install_sshd=True, features=("agents",))
    new = wanted(paths, base=get_image(paths, "pulled"))
    made = capture_image(paths, Guest(agent, tmp_path / "system"), new, Job())
    assert made.oci == ImageConfig(env=("A=b",), cmd=("run",))
    assert (made.install_sshd, made.features) == (True, ("agents", "docker"))


def test_an_image_of_that_name_stays_until_the_new_one_is_whole(paths: Paths) -> None:
    store(paths, "new")
    old = get_image(paths, "new")
    good = layer_tar([directory("."), Entry("file")])
    with pytest.raises(BangerError) as caught:
        capture_image(paths, Sent(good), wanted(paths), Job())
    assert caught.value.code == "already_exists"
    bad = layer_tar([directory("."), Entry("a/../../b")])
    with pytest.raises(BangerError):
        capture_image(paths, Sent(bad), wanted(paths, replaced=old), Job())
    assert get_image(paths, "new").id == old.id
    made = capture_image(paths, Sent(good), wanted(paths, replaced=old), Job())
    assert get_image(paths, "new").id == made.id != old.id
    assert {i.name for i in list_images(paths)} == {"base", "new"}


HOSTILE = {
    "climbs": [directory("."), Entry("../x")],
    "absolute": [directory("."), Entry("/etc/passwd")],
    "twice": [directory("."), Entry("a"), Entry("a")],
    "without a parent": [directory("."), Entry("a/b")],
    "in a file": [directory("."), Entry("a"), Entry("a/b")],
    "a link before its target": [directory("."), link("a", "b"), Entry("b")],
    "a link to a directory": [directory("."), directory("d"), link("a", "d")],
    "a link out": [directory("."), link("a", "../../etc/shadow")],
    "a link to itself": [directory("."), link("a", "a")],
    "a link to what is left out": [
        directory("."), directory("tmp"), Entry("tmp/x"), link("a", "tmp/x"),
    ],
    "a whole disk": [directory("."), Entry("a", content=b"x" * 100)],
    "no root": [directory("usr")],
    "two roots": [directory("."), directory("./")],
    "too long a name": [directory("."), Entry("n" * 256)],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_stream_that_no_agent_sends_is_refused(paths: Paths, what: str) -> None:
    with pytest.raises(BadImage):
        tar = LiveTar(iter([layer_tar(HOSTILE[what])]), decide=decide, most_bytes=99)
        tar.root_mode()
        tar.copy(io.BytesIO(), work=Job())
    if what != "a whole disk":
        with pytest.raises(BangerError) as caught:
            capture_image(paths, Sent(layer_tar(HOSTILE[what])), wanted(paths), Job())
        assert caught.value.reason == "bad_image"
    assert [i.name for i in list_images(paths)] == ["base"]
    assert [p.name for p in paths.images.iterdir() if p.is_dir() and p.name.startswith(".")] == []


def test_a_stream_that_ends_early_leaves_nothing(paths: Paths) -> None:
    whole = layer_tar([directory("."), Entry("a", content=b"x" * 5000)])
    with pytest.raises(BangerError, match="cut off"):
        capture_image(paths, Sent(whole[:3000]), wanted(paths), Job())
    assert [i.name for i in list_images(paths)] == ["base"]


def test_a_full_disk_is_noticed_before_it_is_full(paths: Paths) -> None:
    with pytest.raises(BangerError) as caught:
        capture_image(paths, Sent(b""), wanted(paths, reserve_bytes=1000 * TIB), Job())
    assert caught.value.reason == "disk_full"


def test_cancelling_in_the_middle_leaves_nothing(paths: Paths) -> None:
    job = Job()
    whole = layer_tar([directory("."), *(Entry(f"f{i}", content=b"x" * 4096) for i in range(64))])
    reached = threading.Event()

    class Slow(Sent):
        def capture(self, exclude: Any, enter: Any, receive: Any, **options: Any) -> Any:
            def chunks() -> Iterator[bytes]:
                yield whole[:100_000]
                reached.set()
                job.cancel()
                yield whole[100_000:]

            return receive(chunks())

    with pytest.raises(JobCancelled):
        capture_image(paths, Slow(b""), wanted(paths), job)
    assert reached.is_set()
    assert [p.name for p in paths.images.iterdir() if p.is_dir() and p.name.startswith(".")] == []


def test_output_is_shown_as_lines_that_do_a_terminal_no_harm() -> None:
    shown: list[str] = []
    lines = Lines(shown.append)
    for piece in (
        b"one\ntw",
        b"o\r\n\x1b[2Jthree\n",
        b"50%\r100%\r",
        b"\xff" + b"y" * 5000,
        b"end",
    ):
        lines.feed(piece)
    lines.end()
    assert shown[:5] == ["one", "two", "\N{REPLACEMENT CHARACTER}[2Jthree", "50%", "100%"]
    assert all(len(line) <= 2000 and line.isprintable() for line in shown)
    assert shown[-1] == "end"
    assert lines.tail == shown[-5:]


def test_a_system_without_a_known_package_manager_says_so(agent: Agent, tmp_path: Path) -> None:
    guest = Guest(agent, tmp_path)
    assert guest.system().manager == ""
    with pytest.raises(BangerError) as caught:
        guest.install(["jq"], print)
    assert caught.value.code == "not_found"
    release = agent.directory / "root" / "etc" / "os-release"
    release.write_text('ID=neon\nID_LIKE="ubuntu debian"\n')
    assert (guest.system().id, guest.system().manager) == ("neon", "apt-get")
    with pytest.raises(BangerError, match="no package name"):
        guest.install(["--root=/x"], print)
