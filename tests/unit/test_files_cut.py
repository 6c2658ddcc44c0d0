"""State that is being replaced when the process dies: the old one or the new one, never half.

Each writer is cut at its n-th call of the system, for every n, as `kill -9` does: nothing of its
own runs afterwards, its cleaning up included. What the next start of the daemon clears up is all
that may lie beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import files
from banger.config.paths import Paths
from banger.daemon.leftovers import sweep_leftovers
from banger.disk.blank import write_blank_disk
from banger.disk.initrd import write_vm_initrd
from banger.guest.endpoint import TcpEndpoint
from banger.host.lease import LeaseId
from banger.kernel.entries import publish_entry
from banger.ssh.known_hosts import replace_host
from banger.vm.handles import Handles, find_handles, write_handles
from banger.workspace.manifest import accept_offer, manifest_path
from fakes.world import DISK

ENDPOINT = TcpEndpoint(address="127.0.0.1", port=7000)
VM_ID = "0123456789abcdef" * 2
IMAGE_ID = "f" * 32
_CALLS = ("open", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "ftruncate",
          "truncate", "chmod", "symlink", "write", "pwrite", "copy_file_range")  # fmt: skip


class Cut(BaseException):
    """The process has ended; whatever catches this only runs into the next one."""


class Mortal:
    """Lets so many calls of the system happen, and none after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.count = 0
        for name in _CALLS:
            monkeypatch.setattr(os, name, self._guard(getattr(os, name)))

    def _guard(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if self.left == 0:
                raise Cut
            self.left -= 1
            self.count += 1
            return real(*args, **kwargs)

        return call


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(
        state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "run",
        config_file=tmp_path / "config" / "config.toml",
    )  # fmt: skip
    for directory in (paths.vm(VM_ID).directory, paths.ssh, paths.templates, paths.images,
                      paths.kernels):  # fmt: skip
        directory.mkdir(parents=True, mode=0o700)
    return paths


Writer = Callable[[Paths, str], None]
Reader = Callable[[Paths], str | None]


def _handles(paths: Paths, word: str) -> None:
    write_handles(paths.vm(VM_ID), Handles(vmm="qemu", endpoint=ENDPOINT, lease_id=LeaseId(word)))


def _read_handles(paths: Paths) -> str | None:
    found = find_handles(paths.vm(VM_ID))
    return None if found is None else found.lease_id


def _known_hosts(paths: Paths, word: str) -> None:
    replace_host(paths.known_hosts, ["web.vm"], f"ssh-ed25519 {word} web")


def _read_known_hosts(paths: Paths) -> str | None:
    try:
        return paths.known_hosts.read_text().split()[2]
    except FileNotFoundError:
        return None


def _seen(paths: Paths, word: str) -> None:
    files.write_atomic(paths.index_seen, word.encode() * 5000)


def _read_seen(paths: Paths) -> str | None:
    return _whole(paths.index_seen, 5000)


def _whole(path: Path, times: int) -> str | None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    word = text[: len(text) // times]
    assert text == word * times, f"{path.name} is half"
    return word


def _disk(paths: Paths, word: str) -> None:
    write_blank_disk(paths, "work", DISK, paths.vm(VM_ID).work)


def _read_disk(paths: Paths) -> str | None:
    path = paths.vm(VM_ID).work
    if not path.exists():
        return None
    (template,) = paths.templates.glob("work-*")
    assert path.stat().st_size == template.stat().st_size, "the disk is half"
    # What lies behind is holes.
    with path.open("rb") as disk, template.open("rb") as whole:
        assert disk.read(8 << 20) == whole.read(8 << 20), "the disk is half"
    return "new"


def lay_template(paths: Paths, templates: Path) -> None:
    (template,) = templates.glob("work-*")
    files.clone(template, paths.templates / template.name)


def _initrd(paths: Paths, word: str) -> None:
    write_vm_initrd(Path(__file__), paths.vm(VM_ID).initrd, {"banger/word": word.encode()})


def _read_initrd(paths: Paths) -> str | None:
    try:
        content = paths.vm(VM_ID).initrd.read_bytes()
    except FileNotFoundError:
        return None
    assert content.startswith(Path(__file__).read_bytes())
    assert content[-600:].count(b"TRAILER!!!") == 1, "its last archive is not whole"
    return "new" if b"new" in content[-600:] else "old"


def _tree(directory: Path, word: str) -> None:
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_text(word * 1000)


def _read_tree(directory: Path) -> str | None:
    if not directory.exists():
        return None
    (word,) = {_whole(directory / name, 1000) for name in ("a", "b")}
    return word


def _kernel(paths: Paths, word: str) -> None:
    with files.staging_directory(paths.kernels, "pull-k") as staging:
        _tree(staging / "entry", word)
        publish_entry(paths, "k", staging / "entry")


def _image(paths: Paths, word: str) -> None:
    with files.staging_directory(paths.images, "pull-x") as staging:
        _tree(staging / IMAGE_ID, word)
        files.publish_directory(staging / IMAGE_ID, paths.images / IMAGE_ID)


def _offer(paths: Paths, word: str) -> None:
    directory = paths.vm(VM_ID).directory
    path = manifest_path(directory, "/root/repo")
    path.parent.mkdir(exist_ok=True)
    files.write_atomic(path.with_suffix(".offer-abc"), word.encode() * 1000)
    accept_offer(directory, "/root/repo", "abc")


def _read_offer(paths: Paths) -> str | None:
    return _whole(manifest_path(paths.vm(VM_ID).directory, "/root/repo"), 1000)


WRITERS: dict[str, tuple[Writer, Reader]] = {
    "handles": (_handles, _read_handles),
    "known_hosts": (_known_hosts, _read_known_hosts),
    "versions seen": (_seen, _read_seen),
    "disk": (_disk, _read_disk),
    "initrd": (_initrd, _read_initrd),
    "kernel": (_kernel, lambda paths: _read_tree(paths.kernels / "k")),
    "image": (_image, lambda paths: _read_tree(paths.images / IMAGE_ID)),
    "workspace manifest": (_offer, _read_offer),
}


@pytest.mark.parametrize(
    ("name", "before"),
    # A disk is never replaced.
    [(n, b) for n in WRITERS for b in (None, "old") if (n, b) != ("disk", "old")],
)
def test_state_cut_at_any_call_is_old_or_new_and_the_next_start_clears_up(
    paths: Paths,
    templates: Path,
    name: str,
    before: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, read = WRITERS[name]
    at = 0
    seen = set()
    while True:
        shutil.rmtree(paths.state)
        for directory in (paths.vm(VM_ID).directory, paths.ssh, paths.templates, paths.images,
                          paths.kernels):  # fmt: skip
            directory.mkdir(parents=True, mode=0o700)
        if before is not None:
            write(paths, before)
        elif name == "disk":
            lay_template(paths, templates)
        with monkeypatch.context() as context:
            mortal = Mortal(context)
            mortal.left = at
            try:
                write(paths, "new")
                ended = True
            except Cut:
                ended = False
        found = read(paths)
        assert found in (before, "new"), f"cut at call {at}"
        seen.add(found)
        sweep_leftovers(paths)
        assert hidden(paths) == [], f"cut at call {at}"
        assert read(paths) == found, f"cut at call {at}: clearing up took what was whole"
        write_again(write, paths, name)
        assert read(paths) == "new"
        if ended:
            break
        at += 1
    assert at > 3
    assert seen == {before, "new"}


def write_again(write: Writer, paths: Paths, name: str) -> None:
    if name == "disk":
        paths.vm(VM_ID).work.unlink(missing_ok=True)
    write(paths, "new")


def hidden(paths: Paths) -> list[str]:
    return [
        p.name
        for p in paths.state.rglob(".*")
        if not p.name.endswith(".lock") and p.name != ".lock"
    ]


def test_somebody_elses_hidden_files_stay(paths: Paths) -> None:
    for path in (paths.images / ".name.lock", paths.kernels / ".keep", paths.state / ".profile"):
        path.touch()
    sweep_leftovers(paths)
    assert len(hidden(paths)) == 2


def test_files_among_the_builds_are_no_trouble(
    paths: Paths, caplog: pytest.LogCaptureFixture
) -> None:
    fetched = paths.build_cache / "fetched" / "archive.tar"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    sweep_leftovers(paths)
    assert fetched.exists()
    assert caplog.records == []


@pytest.mark.parametrize(("name", "lock"), [("ssh", ".lock"), ("", ".bin.lock")])
def test_what_somebody_is_at_work_on_stays(paths: Paths, name: str, lock: str) -> None:
    directory = paths.state / name
    with files.locked(directory / lock):
        (directory / ".known_hosts.0123abcd").touch()
        sweep_leftovers(paths)
        assert (directory / ".known_hosts.0123abcd").exists()
    sweep_leftovers(paths)
    assert not (directory / ".known_hosts.0123abcd").exists()


# --- what the power takes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["handles", "known_hosts", "versions seen", "disk", "kernel",
                                  "image"])  # fmt: skip
def test_content_is_on_disk_before_its_name_and_the_name_before_it_is_told(
    paths: Paths, templates: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, _ = WRITERS[name]
    if name == "disk":
        lay_template(paths, templates)
    synced: list[str] = []
    named: list[tuple[str, set[str]]] = []
    real = {n: getattr(os, n) for n in ("fsync", "rename", "replace")}

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real["fsync"](fd)

    def rename(source: Path, target: Path) -> None:
        source = Path(source)
        below = [str(p) for p in source.rglob("*")] if source.is_dir() else []
        assert {str(source), *below} <= set(synced), f"{source} gets its name unsynced"
        real["rename"](source, target)
        named.append((str(Path(target).parent), set()))
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    write(paths, "new")
    assert named
    assert synced[0] == named[-1][0]


def test_directories_change_places_where_the_filesystem_cannot_do_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    class OldLibrary:
        """A C library before renameat2."""

    for old in (False, True):
        if old:
            monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: OldLibrary())
        one, other = tmp_path / "one", tmp_path / "other"
        for path in (one, other):
            path.mkdir(exist_ok=True)
            (path / "name").write_text(path.name)
        files.exchange(one, other)
        assert [(p / "name").read_text() for p in (one, other)] == ["other", "one"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]


def test_exchange_that_fails_leaves_both(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "one", tmp_path / "absent")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
