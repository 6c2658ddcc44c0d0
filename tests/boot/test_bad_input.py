"""Bad input: one clear message, the right status, the next command, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import PATIENCE_S, SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")

RUN = ("vm", "run", "--rm", *SMALL)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--branch", "b", "--", "true"), "--branch needs the PATH"),
        (("--dry-run", "--", "true"), "--dry-run needs the PATH"),
        (("--include-untracked", "--", "true"), "--include-untracked needs the PATH"),
        (("--mode", "full_copy", "--", "true"), "--mode needs the PATH"),
        (("--from", "HEAD", ".", "--", "true"), "--from needs --branch"),
        (("--disk-size", "3X", "--", "true"), "is no size"),
        (("--memory", "-1", "--", "true"), "is no size"),
        (("--vcpu", "many", "--", "true"), "not a valid integer"),
        (("--env", "NOVALUE", "--", "true"), "--env takes K=V"),
        (("-d", "--", "true"), "exclude each other"),
        (("--",), "command is missing"),
        (("--no-such-flag", "--", "true"), "No such option"),
    ],
)
def test_wrong_usage_is_status_2_before_anything_exists(
    banger: Installation, words: tuple[str, ...], told: str
) -> None:
    done = banger(*RUN, *words)
    assert (done.status, told in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--vcpu", "0"), "--vcpu 0 is out of range: 1 to 32"),
        (("--vcpu", "33"), "--vcpu 33 is out of range"),
        (("--memory", "1M"), "128 MiB or more"),
        (("--memory", "4096G"), "at most this host's"),
        (("--disk-size", "500G"), "64M to 128G"),
        (("--name", "Bad_Name"), "character 'B' at position 1"),
        (("--name", "-x"), "hyphen"),
        (("--image", "debian-bookwurm"), "did you mean 'debian-bookworm'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_rule(
    banger: Installation, words: tuple[str, ...], told: str
) -> None:
    done = banger(*RUN, *words, "--", "true")
    assert (done.status, told in done.err) == (1, True), done.err
    assert "\nhint: " in done.err


def test_an_unknown_kernel_is_not_found(banger: Installation) -> None:
    done = banger("kernel", "pull", "linux-1.0")
    assert done.status == 1
    assert "linux-1.0" in done.err


def _git(root: Path, *words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=T", "-c", "user.email=t@example.invalid",
         "-c", "protocol.file.allow=always", *words],
        cwd=root, check=True, capture_output=True,
    )  # fmt: skip


def _missing(root: Path) -> Path:
    return root / "nowhere"


def _plain(root: Path) -> Path:
    (root / "plain").mkdir()
    return root / "plain"


def _bare(root: Path) -> Path:
    _git(root, "init", "-q", "--bare", "bare.git")
    return root / "bare.git"


def _submodules(root: Path) -> Path:
    for name in ("inner", "outer"):
        _git(root, "init", "-q", name)
        (root / name / "f").write_text("x")
        _git(root / name, "add", "f")
        _git(root / name, "commit", "-qm", "c")
    _git(root / "outer", "submodule", "add", "-q", str(root / "inner"), "sub")
    _git(root / "outer", "commit", "-qm", "sub")
    return root / "outer"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_missing, "nowhere"),
        (_plain, "git"),
        (_bare, "bare"),
        (_submodules, "full_copy"),
    ],
)
def test_a_path_that_is_no_usable_repository_is_refused_before_a_vm_exists(
    banger: Installation, tmp_path: Path, make: object, told: str
) -> None:
    assert callable(make)
    done = banger(*RUN, str(make(tmp_path)), "--", "true")
    assert done.status == 1
    assert told in done.err
    assert "launch" not in done.err


def test_a_dry_run_lists_exactly_what_would_go_and_makes_no_vm(
    banger: Installation, repository: Path
) -> None:
    done = banger.ok("vm", "run", "--dry-run", str(repository))
    assert done.text.splitlines() == [
        ".gitignore",
        "Makefile",
        '"a name with\\nnewline"',
        "link",
        "message",
        "run.sh",
        "sub/file",
    ]


def test_more_memory_than_the_budget_is_refused_with_the_sum(banger: Installation) -> None:
    with open("/proc/meminfo") as f:
        total_mib = int(f.readline().split()[1]) // 1024
    done = banger("vm", "run", "--rm", "--memory", str(total_mib - 1), "--", "true")
    assert done.status == 1
    assert f"of this host's {total_mib} MiB" in done.err
    assert "--allow-overcommit" in done.err


@pytest.fixture
def reconfigured(banger: Installation) -> Iterator[Installation]:
    """The installation, free to change its configuration; it is put back afterwards."""
    before = banger.config.read_text()
    yield banger
    banger.config.write_text(before)
    banger.stop_daemon()


def _configure(banger: Installation, line: str) -> None:
    banger.stop_daemon()
    banger.config.write_text(banger.config.read_text() + line + "\n")


def test_a_host_without_free_space_refuses_and_names_the_reserve(
    reconfigured: Installation,
) -> None:
    _configure(reconfigured, 'disk_reserve = "900T"')
    done = reconfigured(*RUN, "--", "true")
    assert done.status == 1
    assert "disk_reserve" in done.err


def test_firecracker_where_it_cannot_run_is_refused_with_the_reason(
    reconfigured: Installation,
) -> None:
    status = reconfigured.json("daemon", "status", "--json")
    if status["vmm"]["driver"] == "firecracker":
        _configure(reconfigured, 'firecracker_bin = "/nonexistent/firecracker"')
    _configure(reconfigured, 'vmm = "firecracker"')
    done = reconfigured(*RUN, "--", "true")
    assert done.status == 1
    assert "firecracker" in done.err
    assert "\nhint: " in done.err


def test_an_unknown_key_in_the_configuration_is_named_with_the_nearest(
    reconfigured: Installation,
) -> None:
    _configure(reconfigured, 'bridge_nam = "x"')
    done = reconfigured("vm", "list")
    assert done.status == 1
    assert "unknown field `bridge_nam`; did you mean `bridge_name`?" in done.err


def test_a_guest_that_never_answers_is_kept_and_found_later(reconfigured: Installation) -> None:
    banger = reconfigured
    _configure(banger, 'ready_timeout = "2s"')
    others = set(banger.state.glob("vms/*/handles.json"))
    p = banger.popen("vm", "create", "--name", "slow", *SMALL)
    assert p.stderr
    for line in p.stderr:
        if line.startswith(b"ready:"):
            break
    # From its file: whoever asks a command first comes after the guest on a host with KVM.
    (handles,) = set(banger.state.glob("vms/*/handles.json")) - others
    pid = json.loads(handles.read_text())["process"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    _, err = p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 1
    assert b"no answer from the guest agent within" in err
    assert b"hint: banger vm logs slow" in err
    os.kill(pid, signal.SIGCONT)
    # It comes up late: the record says running, and a connection gets through once it listens.
    while banger("vm", "exec", "slow", "--", "true").status:
        assert banger.show("slow")["state"] == "running"
    banger.ok("vm", "delete", "slow")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_disk_that_fills_up_during_create_is_said_and_leaves_nothing(
    tmp_path: Path, reconfigured: Installation
) -> None:
    banger = reconfigured
    state = banger.root / "tiny"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", state], check=True)
    vms = banger.state / "vms"
    try:
        subprocess.run(["mount", "--bind", state, vms], check=True)
        try:
            _configure(banger, 'disk_reserve = "0"')
            (state / "filler").write_bytes(b"x" * (7 << 20))
            done = banger(*RUN, "--", "true")
            assert done.status == 1
            assert "No space left on device" in done.err
            assert "hint: df -h" in done.err
            (state / "filler").unlink()
        finally:
            # Nobody is at work there while it is taken away.
            banger.stop_daemon()
            subprocess.run(["umount", vms], check=True)
    finally:
        subprocess.run(["umount", state], check=True)
