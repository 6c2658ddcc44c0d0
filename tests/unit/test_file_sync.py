"""`[[file_sync]]`: its rules, its plan, what the real agent makes of it, and when it is sent."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from banger.config.file_sync import FileSync
from banger.config.settings import Settings, read_settings
from banger.errors import BangerError
from banger.guest.client import GuestClient
from banger.guest.endpoint import TcpEndpoint
from banger.vm import file_sync as module
from banger.vm.file_sync import SyncPlan, choose_entries, plan_file_sync, write_sync_tar
from fakes.agent import TOKEN, running_agent
from fakes.world import EMPTY, World


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return read_settings(path, home=Path("/home/ann"))


def entry(**words: str) -> str:
    return "[[file_sync]]\n" + "".join(f"{k} = '{v}'\n" for k, v in words.items())


GOOD = entry(host="~/a", guest="~/a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (entry(guest="~/a"), "entry 1: host is missing"),
        (entry(host="~/a"), "entry 1: guest is missing"),
        (entry(host="", guest="~/a"), "host must not be empty"),
        (entry(host="~/a", guest=""), "guest must not be empty"),
        (entry(host="a/b", guest="~/a"), "host must begin with ~/ or be an absolute path"),
        (entry(host="~", guest="~/a"), "host must begin with ~/"),
        (entry(host="~/", guest="~/a"), "host must name something below the home"),
        (entry(host="~/./", guest="~/a"), "host must name something below the home"),
        (entry(host="~bob/a", guest="~/a"), "host must begin with ~/; the home of another user"),
        (entry(host="~/a/../b", guest="~/a"), "host must not contain .."),
        (entry(host="/etc/passwd", guest="~/a"), "host must lie inside /home/ann"),
        (entry(host="/home/anna/a", guest="~/a"), "host must lie inside /home/ann"),
        (entry(host="/home/ann", guest="~/a"), "host must lie inside /home/ann"),
        (entry(host="~/a", guest="a"), "guest must begin with ~/ or /root/"),
        (entry(host="~/a", guest="~/"), "guest must name something below the home"),
        (entry(host="~/a", guest="/etc/x"), "guest must begin with ~/ or /root/"),
        (entry(host="~/a", guest="~root/x"), "guest must begin with ~/ or /root/"),
        (entry(host="~/a", guest="~/x/../../etc"), "guest must not contain .."),
        ("[[file_sync]]\nhost = \"~/a\\u0007\"\nguest = '~/a'\n", "no control characters"),
        ("[[file_sync]]\nhost = '~/a'\nguest = \"~/a\\u009b\"\n", "no control characters"),
        (entry(host="~/a", guest="~/a", mode="rw"), 'mode must be octal, such as "0600"'),
        (entry(host="~/a", guest="~/a", mode="0888"), "mode must be octal"),
        (entry(host="~/a", guest="~/a", mode="04755"), "mode must be octal"),
        ("[[file_sync]]\nhost = '~/a'\nguest = '~/a'\nmode = 600\n", "mode must be a string"),
        (entry(host="~/a", guest="~/a", when="stop"), 'when must be "create" or "start"'),
        (entry(host="~/a", guest="~/a", owner="1"), "unknown key `owner`"),
        (GOOD + entry(host="~/b", guest="b"), "file_sync entry 2: guest must begin with"),
        ("file_sync = 'all'\n", r"write \[\[file_sync\]\]"),
        ("[file_sync]\nhost = '~/a'\n", r"write \[\[file_sync\]\]"),
    ],
)
def test_broken_rule_is_named_with_the_number_of_its_entry(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(BangerError, match=expected) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "config.toml") in caught.value.message


def test_entry_has_a_private_mode_and_is_for_the_first_start_unless_it_says_otherwise(
    tmp_path: Path,
) -> None:
    assert read(tmp_path, "").file_sync == ()
    first, second = read(
        tmp_path, GOOD + entry(host="/home/ann//b", guest="/root/./c/", mode="644", when="start")
    ).file_sync
    assert (first.mode_bits, first.when) == (0o600, "create")
    assert (second.mode_bits, second.when) == (0o644, "start")
    assert second.host_parts(Path("/home/ann")) == ("b",)
    assert second.guest_parts() == ("c",)


def test_entries_of_the_owner_replace_those_of_the_host(tmp_path: Path) -> None:
    host, owner = tmp_path / "host.toml", tmp_path / "owner.toml"
    host.write_text(GOOD + GOOD)
    owner.write_text(entry(host="~/mine", guest="~/mine"))
    assert [e.host for e in read_settings(host, owner).file_sync] == ["~/mine"]


# --- the plan -------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "tool" / "deep" / "empty").mkdir(parents=True)
    (home / "token").write_text("secret")
    (home / "token").chmod(0o644)
    (home / "tool" / "run.sh").write_text("#!/bin/sh\n")
    (home / "tool" / "run.sh").chmod(0o755)
    (home / "tool" / "deep" / "key").write_text("k")
    (home / "tool" / "deep" / "key").chmod(0o600)
    (home / "tool" / "deep").chmod(0o700)
    return home


def plan(home: Path, *entries: FileSync) -> SyncPlan:
    return plan_file_sync(entries, home)


def sent(made: SyncPlan) -> dict[str, tarfile.TarInfo]:
    out = io.BytesIO()
    write_sync_tar(made, out)
    out.seek(0)
    with tarfile.open(fileobj=out, mode="r:") as tar:
        return {member.name: member for member in tar.getmembers()}


TREE = FileSync(host="~/tool", guest="~/.tool", mode="0640")


def test_file_gets_the_mode_of_its_entry_and_belongs_to_root(home: Path) -> None:
    (member,) = sent(plan(home, FileSync(host="~/token", guest="~/.auth/token"))).values()
    assert (member.name, member.mode) == (".auth/token", 0o600)
    assert (member.uid, member.gid, member.size) == (0, 0, 6)


def test_directory_is_walked_with_the_modes_of_its_files_and_its_empty_directories(
    home: Path,
) -> None:
    found = {name: (m.isdir(), m.mode) for name, m in sent(plan(home, TREE)).items()}
    assert found == {
        ".tool": (True, 0o755),
        ".tool/run.sh": (False, 0o755),
        ".tool/deep": (True, 0o700),
        ".tool/deep/key": (False, 0o600),
        ".tool/deep/empty": (True, 0o755),
    }


def test_what_is_not_there_is_a_warning(home: Path) -> None:
    made = plan(home, FileSync(host="~/none/at/all", guest="~/x"),
                FileSync(host="~/token/below", guest="~/x"))  # fmt: skip
    assert made.members == ()
    assert [w.partition(": ")[2] for w in made.warnings] == [
        "~/none/at/all does not exist and is skipped",
        "~/token/below does not exist and is skipped",
    ]


def test_links_and_special_files_inside_a_directory_are_skipped_with_a_warning(
    home: Path, tmp_path: Path
) -> None:
    deep = home / "tool" / "deep"
    (deep / "link").symlink_to("key")
    (deep / "out").symlink_to("/etc")
    os.mkfifo(deep / "fifo")
    short = os.open(deep, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{short}/socket")
    os.close(short)
    made = plan(home, TREE)
    assert {Path(*m.source).name for m in made.members} == {
        "tool", "run.sh", "deep", "key", "empty",
    }  # fmt: skip
    assert [w.removeprefix("file_sync: ~/tool/deep/") for w in made.warnings] == [
        "fifo is a FIFO and is skipped",
        "link is a symlink and is skipped",
        "out is a symlink and is skipped",
        "socket is a socket and is skipped",
    ]


def test_link_at_the_top_is_followed_inside_the_home(home: Path) -> None:
    (home / "moved").symlink_to("tool/deep")
    (home / "absolute").symlink_to(home / "token")
    assert "x/key" in sent(plan(home, FileSync(host="~/moved", guest="~/x")))
    assert sent(plan(home, FileSync(host="~/absolute", guest="~/y")))["y"].size == 6
    assert sent(plan(home, FileSync(host="~/moved/key", guest="~/z")))["z"].size == 1


@pytest.mark.parametrize("path", ["away", "away/passwd"])
def test_link_that_leads_out_of_the_home_is_refused(home: Path, path: str) -> None:
    (home / "away").symlink_to("/etc")
    with pytest.raises(BangerError, match="which is not inside"):
        plan(home, FileSync(host=f"~/{path}", guest="~/x"))


def test_home_that_is_itself_a_link_is_the_home(home: Path, tmp_path: Path) -> None:
    (tmp_path / "ann").symlink_to(home)
    entries = (FileSync(host=f"{tmp_path}/ann/token", guest="~/t"),
               FileSync(host=f"{home}/token", guest="~/u"))  # fmt: skip
    assert set(sent(plan(tmp_path / "ann", *entries))) == {"t", "u"}


def test_file_that_becomes_a_link_before_it_is_sent_is_not_followed(home: Path) -> None:
    made = plan(home, TREE, FileSync(host="~/token", guest="~/token"))
    (home / "token").unlink()
    (home / "token").symlink_to("/etc/passwd")
    (home / "tool" / "deep").rename(home / "elsewhere")
    (home / "tool" / "deep").symlink_to("/etc")
    assert set(sent(made)) == {".tool", ".tool/run.sh"}


def test_token_that_is_renewed_before_it_is_sent_arrives_new(home: Path) -> None:
    made = plan(home, FileSync(host="~/token", guest="~/token"))
    (home / "new").write_text("renewed!")
    (home / "new").rename(home / "token")
    assert sent(made)["token"].size == 8


def test_names_of_any_bytes_survive(home: Path) -> None:
    odd = os.fsdecode(b"\xff \xc3\xa9") + "n" * 200
    (home / "tool" / odd).write_text("x")
    out = io.BytesIO()
    write_sync_tar(plan(home, TREE), out)
    assert os.fsencode(f".tool/{odd}") in out.getvalue()


def test_only_entries_of_every_start_are_sent_after_the_first() -> None:
    entries = (TREE, FileSync(host="~/token", guest="~/t", when="start"))
    assert choose_entries(entries, first_start=True) == entries
    assert choose_entries(entries, first_start=False) == entries[1:]


# --- the guest ------------------------------------------------------------------------------------


def deliver(made: SyncPlan, monkeypatch: pytest.MonkeyPatch, guest_home: Path) -> None:
    """Send a plan through the real agent; its /root is a directory of this host."""
    monkeypatch.setattr(module, "GUEST_HOME", str(guest_home))

    async def connect(*, timeout_s: float = 5) -> socket.socket:
        return agent.connect()

    async def send() -> None:
        client = GuestClient(TcpEndpoint(address="127.0.0.1", port=1), TOKEN)
        client.open = connect  # type: ignore[method-assign]  # the agent listens on a Unix socket
        ended = asyncio.get_running_loop().create_future()
        await module.send_files(client, made, ended, "web")

    with running_agent() as agent:
        asyncio.run(send())


def test_files_of_the_guest_are_replaced_and_those_beside_them_stay(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = tmp_path / "root"
    (guest / ".tool").mkdir(parents=True)
    (guest / ".tool" / "own").write_text("the guest's")
    (guest / ".tool" / "run.sh").write_text("old")
    before = (guest / ".tool" / "run.sh").stat().st_ino
    deliver(plan(home, TREE, FileSync(host="~/token", guest="~/.auth/token")), monkeypatch, guest)
    assert (guest / ".tool" / "own").read_text() == "the guest's"
    assert (guest / ".tool" / "run.sh").read_text() == "#!/bin/sh\n"
    assert (guest / ".tool" / "run.sh").stat().st_ino != before
    assert (guest / ".tool" / "deep" / "empty").is_dir()
    assert (guest / ".tool" / "deep").stat().st_mode & 0o777 == 0o700
    assert (guest / ".auth" / "token").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in guest.iterdir()) == [".auth", ".tool"]


def test_link_of_the_guest_leads_no_file_out_of_the_named_tree(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    guest.mkdir()
    (guest / ".tool").symlink_to(outside)  # the tree's own name: replaced
    (guest / "token").symlink_to(outside / "file")
    deliver(plan(home, TREE, FileSync(host="~/token", guest="~/token")), monkeypatch, guest)
    assert (guest / ".tool" / "run.sh").exists()
    assert (guest / "token").read_text() == "secret"
    assert not (guest / "token").is_symlink()
    (guest / "led").symlink_to(outside)
    made = plan(home, FileSync(host="~/token", guest="~/led/token"))
    with pytest.raises(BangerError, match="symbolic link"):
        deliver(made, monkeypatch, guest)
    assert [p.name for p in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "untouched"


# --- when it is sent ------------------------------------------------------------------------------


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.stages.append(stage)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def names(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        return archive.getnames()


@pytest.fixture
def syncing(templates: Path, home: Path) -> World:
    entries = (FileSync(host="~/tool/run.sh", guest="~/once"),
               FileSync(host="~/token", guest="~/each", when="start"),
               FileSync(host="~/none", guest="~/none"))  # fmt: skip
    world = World(templates=templates, file_sync=entries)
    world.ctx.home = home
    return world


@pytest.mark.asyncio
async def test_create_entries_go_at_the_first_start_and_start_entries_at_each(
    templates: Path, syncing: World
) -> None:
    from banger.vm.start import start
    from banger.vm.stop import stop

    world, told = syncing, Told()
    try:
        vm = await world.create(start=False)
        assert not vm.files_synced
        seen = []
        for _ in range(2):
            async with world.ctx.locked(vm.id):
                vm = await start(
                    world.ctx, world.store.resolve("web"), told, allow_overcommit=False
                )
            (received,) = world.driver.guests[vm.id].received
            seen.append(names(received[1]))
            assert received[0] == {"path": "/root", "mode": "merge", "owner": None}
            await stop(world.ctx, vm)
        assert seen == [["once", "each"], ["each"]]
        assert told.stages[:7] == [
            "plan", "disks", "lease", "handles", "launch", "ready", "file_sync",
        ]  # fmt: skip
        assert told.warnings == ["file_sync: ~/none does not exist and is skipped"]
    finally:
        await world.close()


@pytest.mark.asyncio
async def test_guest_that_refuses_the_files_fails_the_create(syncing: World) -> None:
    try:
        syncing.driver.put_error = "No space left on device"
        with pytest.raises(BangerError, match="file_sync.*No space left"):
            await syncing.create()
        assert syncing.census() == EMPTY
    finally:
        await syncing.close()


@pytest.mark.asyncio
async def test_file_that_cannot_be_read_fails_the_create_before_a_machine_runs(
    syncing: World, home: Path
) -> None:
    try:
        (home / "token").unlink()
        (home / "token").symlink_to("/etc/passwd")
        with pytest.raises(BangerError, match="not inside"):
            await syncing.create()
        assert syncing.census() == EMPTY
        assert syncing.driver.guests == {}
    finally:
        await syncing.close()


@pytest.mark.asyncio
async def test_first_start_that_failed_was_none(syncing: World) -> None:
    try:
        vm = await syncing.create(start=False)
        syncing.driver.put_error = "full"
        with pytest.raises(BangerError):
            await syncing.start(vm)
        syncing.driver.put_error = None
        vm = await syncing.start(vm)
        assert names(syncing.driver.guests[vm.id].received[0][1]) == ["once", "each"]
    finally:
        await syncing.close()
