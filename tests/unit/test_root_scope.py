"""Scopes of VMMs: what systemd-run is told, and when a name is free again."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from banger_root import process, scope
from banger_root.errors import HelperError

VM_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scope's cgroup would be."""
    path = tmp_path / "banger.slice" / scope.name_scope(VM_ID)
    monkeypatch.setattr(scope, "find_scope_directory", lambda _: str(path))
    return path


def test_scope_is_bounded_by_what_the_vm_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_program", lambda name: f"/usr/bin/{name}")
    argv = scope.build_scope_argv(VM_ID, vcpu=2, memory_mib=512)
    assert argv[0] == "/usr/bin/systemd-run"
    assert argv[-1] == "--"
    assert set(argv[1:-1]) == {
        "--scope", "--quiet", "--no-ask-password", "--collect", "--slice=banger.slice",
        f"--unit=banger-vm-{VM_ID}.scope", "--property=TasksMax=256",
        "--property=MemoryMax=768M", "--property=CPUQuota=300%",
    }  # fmt: skip


def test_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_program", lambda _: None)
    with pytest.raises(HelperError, match="systemd-run is not installed"):
        scope.build_scope_argv(VM_ID, vcpu=1, memory_mib=128)


def test_name_without_a_cgroup_is_free(directory: Path) -> None:
    scope.wait_free(VM_ID)


def test_name_becomes_free_when_the_cgroup_goes(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    remover = threading.Timer(0.05, shutil.rmtree, [directory])
    remover.start()
    scope.wait_free(VM_ID)
    remover.join()
    assert not directory.exists()


@pytest.mark.parametrize(("populated", "words"), [(1, "processes in it"), (0, "not let go")])
def test_name_that_does_not_become_free_is_refused(
    directory: Path, populated: int, words: str
) -> None:
    directory.mkdir(parents=True)
    (directory / "cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")
    with pytest.raises(HelperError, match=words) as caught:
        scope.wait_free(VM_ID, timeout_s=0.02)
    assert caught.value.reason == "in_use"


def test_cgroup_of_our_own_gets_the_bounds_that_its_controllers_take(tmp_path: Path) -> None:
    for name in ("pids.max", "memory.max"):
        (tmp_path / name).touch()
    scope.bound_cgroup(str(tmp_path), vcpu=2, memory_mib=512)
    assert (tmp_path / "pids.max").read_text() == "256"
    assert (tmp_path / "memory.max").read_text() == str(768 << 20)
    assert not (tmp_path / "cpu.max").exists()
