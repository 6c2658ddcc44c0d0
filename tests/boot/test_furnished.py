"""A VM that gets files of the owner's home and the tools of a repository, by the real agent."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import SMALL, Installation

# What mise is asked for; `use` fails for one tool, as an installation may.
_MISE = """#!/bin/sh
echo "$PWD: mise $*"
case $* in *rust*) exit 3;; esac
"""


@pytest.fixture
def home(banger: Installation) -> Iterator[Path]:
    """A directory of the home with a mise for guests, and a configuration that sends it."""
    before = banger.config.read_text()
    directory = Path(tempfile.mkdtemp(prefix=".banger-test-", dir=Path.home()))
    try:
        (directory / "bin").mkdir()
        (directory / "bin" / "mise").write_text(_MISE)
        (directory / "bin" / "mise").chmod(0o755)
        (directory / "bin" / "skipped").symlink_to("/etc/passwd")
        (directory / "token").write_text("first")
        banger.config.write_text(
            f'{before}\n[[file_sync]]\nhost = "~/{directory.name}/bin"\nguest = "~/.local/bin"\n'
            f'[[file_sync]]\nhost = "{directory}/token"\nguest = "/root/.tool/auth/token"\n'
            'when = "start"\n'
        )
        banger.stop_daemon()
        yield directory
    finally:
        banger.config.write_text(before)
        banger.stop_daemon()
        shutil.rmtree(directory)


def test_files_arrive_before_the_vm_runs_and_the_tools_of_the_repository_after_it(
    banger: Installation, home: Path, repository: Path, nothing_left: None
) -> None:
    (repository / "mise.toml").write_text('[tools]\nnode = "20"\n')
    (repository / "go.mod").write_text("module m\ngo 1.22.1\n")
    (repository / "rust-toolchain").write_text("1.75.0\n")
    subprocess.run(["git", "add", "-A"], cwd=repository, check=True)
    refused = banger("vm", "run", "-d", *SMALL, str(repository))
    assert refused.status == 1
    assert "--no-bootstrap" in refused.err
    done = banger.ok("vm", "run", "-d", "--nat", "--name", "fit", *SMALL, str(repository))
    try:
        assert "skipped is a symlink and is skipped" in done.err
        assert "/root/repo: mise install\n" in done.err
        assert "/root/repo: mise use -g --pin go@1.22.1\n" in done.err
        assert "failed with status 3: mise use -g --pin rust@1.75.0\n" in done.err
        assert "not all tools are installed (status 1)" in done.err
        assert "  banger vm acp fit" in done.text.splitlines()
        begun = banger.show("fit")["bootstrap"]
        assert (begun["state"], begun["problem"]) == ("failed", "status 1")
        look = (
            f'grep -c mise {begun["log"]}; stat -c "%a %u" /root/.tool/auth/token /root/.tool; '
            "cat /root/.tool/auth/token; ls /root/.local/bin; echo mine > /root/.tool/auth/own"
        )
        seen = banger.ok("vm", "exec", "--guest-path", "/", "fit", "--", "sh", "-c", look).text
        assert seen.split()[1:] == ["600", "0", "755", "0", "firstmise"], seen
        # At every start what the host has now, and nothing else of the guest's is touched.
        (home / "token").write_text("second")
        (home / "bin" / "mise").write_text("changed")
        banger.ok("vm", "restart", "fit")
        look = "cat /root/.tool/auth/token /root/.tool/auth/own; head -n 1 /root/.local/bin/mise"
        seen = banger.ok("vm", "exec", "--guest-path", "/", "fit", "--", "sh", "-c", look).text
        assert seen == "secondmine\n#!/bin/sh\n"
        assert banger.show("fit")["files_synced"]
    finally:
        banger.ok("vm", "delete", "fit")
