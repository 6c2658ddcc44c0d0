"""`banger ssh-config`: what OpenSSH makes of it (`ssh -G`), and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.ssh.client_config import (
    BEGIN,
    END,
    add_block,
    build_stanza,
    edit_block,
    include_line,
    is_installed,
    remove_block,
)
from fakes.command_line import CommandLine
from patience import PATIENCE_S


def meaning(config: Path, host: str) -> dict[str, str]:
    """What ssh would do for a host, option by option."""
    program = shutil.which("ssh")
    if program is None:
        pytest.skip("ssh is not installed here")
    done = subprocess.run(
        [program, "-G", "-F", config, host],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def stanza(directory: Path, *, direct: bool = False) -> Path:
    path = directory / "ssh_config"
    path.write_text(
        build_stanza(
            key=directory / "a key",
            known_hosts=(directory / "owner", directory / "daemon 100%"),
            proxy=("/opt/a b/python", "-c", "print('50%')", "agent-proxy"),
            direct=direct,
        )
    )
    return path


def test_openssh_understands_the_stanza(tmp_path: Path) -> None:
    found = meaning(stanza(tmp_path), "web.vm")
    assert found["user"] == "root"
    assert found["hostname"] == "web.vm"
    assert found["identityfile"] == f"{tmp_path}/a key"
    assert found["identitiesonly"] == "yes"
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["updatehostkeys"] in ("false", "no")
    assert found["preferredauthentications"] == "publickey"
    assert found["userknownhostsfile"].startswith(f"{tmp_path}/owner {tmp_path}/daemon 100%")
    assert found["globalknownhostsfile"] == "/dev/null"
    assert found["proxycommand"] == (
        "'/opt/a b/python' -c 'print('\"'\"'50%%'\"'\"')' agent-proxy %n 22"
    )


def test_only_names_of_vms_are_meant(tmp_path: Path) -> None:
    assert "proxycommand" not in meaning(stanza(tmp_path), "web.example")
    assert meaning(stanza(tmp_path), "web.example")["stricthostkeychecking"] == "ask"


@pytest.mark.parametrize(("status", "proxied"), [(0, False), (2, True)])
def test_a_name_that_resolves_is_reached_directly_and_another_through_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, proxied: bool
) -> None:
    asked = tmp_path / "asked"
    getent = tmp_path / "getent"
    getent.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit {status}\n')
    getent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SHELL", "/bin/sh")
    found = meaning(stanza(tmp_path, direct=True), "web.vm")
    assert ("proxycommand" in found) == proxied
    assert found["user"] == "root"
    assert asked.read_text() == "hosts web.vm\n"


def test_included_first_it_wins_and_leaves_other_hosts_as_they_were(tmp_path: Path) -> None:
    ours = stanza(tmp_path)
    config = tmp_path / "config"
    config.write_text("User alice\nHost *\n    Port 2222\n")
    before = meaning(config, "example.org")
    assert edit_block(config, ours, wanted=True)
    assert meaning(config, "example.org") == before
    assert meaning(config, "web.vm")["user"] == "root"
    assert meaning(config, "web.vm")["port"] == "2222"


def test_installing_twice_changes_nothing_and_uninstalling_brings_back_every_byte(
    tmp_path: Path,
) -> None:
    ours, config = stanza(tmp_path), tmp_path / "config"
    text = b"# mine\r\nHost x\n\tUser y\xff\n\n# no newline at the end"
    config.write_bytes(text)
    assert edit_block(config, ours, wanted=True)
    installed = config.read_bytes()
    assert installed.endswith(text)
    assert is_installed(installed, ours)
    inode = config.stat().st_ino
    assert not edit_block(config, ours, wanted=True)
    assert config.stat().st_ino == inode
    assert edit_block(config, ours, wanted=False)
    assert config.read_bytes() == text
    assert not edit_block(config, ours, wanted=False)


def test_a_block_that_stands_elsewhere_moves_to_the_top(tmp_path: Path) -> None:
    ours = stanza(tmp_path)
    block = add_block(b"", ours)
    moved = b"Host x\n" + block.replace(b"ssh_config", b"old/ssh_config") + b"    User y\n"
    assert add_block(moved, ours) == block + b"Host x\n    User y\n"
    assert not is_installed(moved, ours)


def test_an_absent_file_is_made_private(tmp_path: Path) -> None:
    config = tmp_path / "home" / ".ssh" / "config"
    config.parent.parent.mkdir()
    assert not edit_block(config, stanza(tmp_path), wanted=False)
    assert not config.parent.exists()
    assert edit_block(config, stanza(tmp_path), wanted=True)
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700


def test_a_link_stays_a_link_and_its_file_keeps_mode_and_owner(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles" / "ssh.conf"
    target.parent.mkdir()
    target.write_text("Host x\n")
    target.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(target, 12345, 54321)
    owner = (target.stat().st_uid, target.stat().st_gid)
    config = tmp_path / "config"
    config.symlink_to("dotfiles/ssh.conf")
    assert edit_block(config, stanza(tmp_path), wanted=True)
    assert config.is_symlink()
    after = target.stat()
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_uid, after.st_gid) == owner
    assert target.read_bytes().endswith(b"Host x\n")
    assert os.listdir(target.parent) == ["ssh.conf"]


def test_a_link_that_leads_nowhere_yet_is_followed(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.symlink_to("later")
    assert edit_block(config, stanza(tmp_path), wanted=True)
    assert config.is_symlink()
    assert BEGIN in (tmp_path / "later").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        BEGIN + b"\nInclude x\nHost mine\n",
        b"Host mine\n" + END + b"\n",
        BEGIN + b"\n" + BEGIN + b"\n" + END + b"\n",
        BEGIN + b"\nHost mine\n" + END + b"\n",
    ],
)
def test_a_damaged_block_is_told_and_nothing_is_guessed(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "config"
    config.write_bytes(content)
    for wanted in (True, False):
        with pytest.raises(BangerError) as caught:
            edit_block(config, stanza(tmp_path), wanted=wanted)
        assert caught.value.hint == f"$EDITOR {config}"
    assert config.read_bytes() == content


def test_a_file_that_changes_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text("Host x\n")
    real = os.fsync

    def somebody_writes(fd: int) -> None:
        real(fd)
        config.write_text("Host other\n")

    monkeypatch.setattr(os, "fsync", somebody_writes)
    with pytest.raises(BangerError, match="meanwhile"):
        edit_block(config, stanza(tmp_path), wanted=True)
    assert config.read_text() == "Host other\n"
    assert sorted(os.listdir(tmp_path)) == ["config", "ssh_config"]


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    config = tmp_path / "config"
    if kind == "fifo":
        os.mkfifo(config)
    else:
        config.mkdir()
    with pytest.raises(BangerError):
        edit_block(config, stanza(tmp_path), wanted=True)


def test_paths_that_openssh_cannot_be_told_are_refused() -> None:
    for name in ('a"b', "a\nb", "a$b"):
        with pytest.raises(BangerError):
            build_stanza(key=Path("/x") / name, known_hosts=(), proxy=(), direct=False)
    for name in ('a"b', "a*b", "a[b"):
        with pytest.raises(BangerError):
            include_line(Path("/x") / name)
    assert include_line(Path("/x/a b%c")) == 'Include "/x/a b%c"'


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_bare_it_tells_the_path_and_the_line_and_changes_no_file_of_the_users(
    cli: CommandLine, home: Path
) -> None:
    done = cli("ssh-config")
    path = cli.paths.ssh_config
    assert done.out.splitlines() == [
        str(path), f'Include "{path}"', "to include it: banger ssh-config --install",
    ]  # fmt: skip
    assert path.read_text().startswith("# Written by banger")
    assert not (home / ".ssh").exists()
    # The key is there, so that ssh finds it before any VM was made.
    assert stat.S_IMODE(cli.paths.ssh_key.stat().st_mode) == 0o600


def test_install_and_uninstall_say_what_they_did(cli: CommandLine, home: Path) -> None:
    config = home / ".ssh" / "config"
    assert "now includes" in cli("ssh-config", "--install").out
    assert "includes already" in cli("ssh-config", "--install").out
    assert json.loads(cli("ssh-config", "--json").out) == {
        "path": str(cli.paths.ssh_config),
        "include": f'Include "{cli.paths.ssh_config}"',
        "ssh_config": str(config),
        "installed": True,
        "changed": False,
    }
    assert "it is included" in cli("ssh-config").out
    assert "no longer includes" in cli("ssh-config", "--uninstall").out
    assert config.read_bytes() == b""
    assert "did not include" in cli("ssh-config", "--uninstall").out
    assert cli("ssh-config", "--install", "--uninstall").status == 2


def test_the_proxy_of_the_stanza_is_a_command_of_ours(cli: CommandLine, home: Path) -> None:
    cli("ssh-config")
    command = meaning(cli.paths.ssh_config, "web.vm")["proxycommand"]
    assert command.endswith("banger.cli.entry internal agent-proxy %n 22")
    words = subprocess.run(
        ["sh", "-c", command.replace(" %n 22", " --help").replace("%%", "%")],
        check=True, capture_output=True, text=True, timeout=PATIENCE_S,
    ).stdout  # fmt: skip
    assert "agent-proxy" in words


def test_a_stanza_that_is_older_is_written_anew(cli: CommandLine, home: Path) -> None:
    cli("ssh-config")
    fresh = cli.paths.ssh_config.read_text()
    cli.paths.ssh_config.write_text("Host *.vm\n")
    cli("ssh-config", "--install")
    assert cli.paths.ssh_config.read_text() == fresh


def test_removal_needs_no_stanza(cli: CommandLine, home: Path) -> None:
    assert remove_block(add_block(b"x\n", cli.paths.ssh_config)) == b"x\n"
    assert cli("ssh-config", "--uninstall").status == 0
    assert not cli.paths.ssh_config.exists()
