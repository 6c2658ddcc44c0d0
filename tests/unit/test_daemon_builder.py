"""Images that the service may not build: refused there, built by a process of the command's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from banger.config.paths import Paths
from banger.daemon import confinement
from banger.disk.artefacts import built_artefacts
from banger.disk.background import Job
from banger.errors import BangerError
from banger.image import build
from banger.image.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "run",
        config_file=tmp_path / "config.toml",
    )  # fmt: skip


@pytest.fixture
def confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user's process without new privileges, as in the service."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(confinement, "has_no_new_privileges", lambda: True)


def builder(paths: Paths, *words: str) -> tuple[int, list[dict[str, object]]]:
    done = subprocess.run(
        [sys.executable, "-m", "banger.daemon.builder", "--state", paths.state,
         "--cache", paths.cache, *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def put_artefact(paths: Paths) -> None:
    """The cache as a finished build leaves it; the root filesystem's content does not matter."""
    recipe = load_recipe("debian-bookworm-minimal")

    def make(staging: Path) -> None:
        (staging / "rootfs.sqfs").write_bytes(b"hsqs")
        (staging / "build.json").write_bytes(b'{"optional_missing":[]}')

    with built_artefacts(build._cache_of(paths, recipe), build._key(recipe), make, job=Job()):
        pass


def test_privileges_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    status = tmp_path / "status"
    for value, expected in (("0", False), ("1", True)):
        status.write_text(f"Name:\tbangerd\nNoNewPrivs:\t{value}\nSeccomp:\t2\n")
        assert confinement.has_no_new_privileges(status) is expected


def test_kernel_says_it_of_a_process_that_gave_them_up() -> None:
    """prctl(2), PR_SET_NO_NEW_PRIVS = 38: what systemd does for NoNewPrivileges=."""
    code = (
        "import ctypes; from banger.daemon.confinement import has_no_new_privileges as f; "
        "before = f(); ctypes.CDLL(None).prctl(38, 1, 0, 0, 0); print(before, f())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split()[1:] == ["True"], done.stderr


@pytest.mark.asyncio
@pytest.mark.usefixtures("confined")
async def test_build_in_the_service_is_refused_for_the_command_to_do_it(paths: Paths) -> None:
    recipe = load_recipe("debian-bookworm-minimal")
    with pytest.raises(BangerError) as caught:
        await confinement.refuse_build(paths, recipe, "mine")
    assert caught.value.reason == "build_outside"
    hint = "banger image build --name mine --recipe debian-bookworm-minimal"
    assert caught.value.hint == hint


@pytest.mark.asyncio
@pytest.mark.usefixtures("confined")
async def test_what_was_built_already_is_published_by_the_service(paths: Paths) -> None:
    put_artefact(paths)
    await confinement.refuse_build(paths, load_recipe("debian-bookworm-minimal"), "mine")


@pytest.mark.asyncio
async def test_daemon_that_may_build_is_not_refused(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(confinement, "has_no_new_privileges", lambda: False)
    await confinement.refuse_build(paths, load_recipe("debian-bookworm-minimal"), "mine")


def test_builder_leaves_what_is_built_and_ends_well(paths: Paths) -> None:
    put_artefact(paths)
    assert builder(paths, "image", "debian-bookworm-minimal") == (0, [{"result": {}}])
    assert not (paths.state / "images").exists()  # publishing is the daemon's part


def test_builder_tells_what_is_wrong_as_its_last_line(paths: Paths) -> None:
    status, lines = builder(paths, "image", "no-such-recipe")
    assert status == 1
    error = lines[-1]["error"]
    assert isinstance(error, dict)
    assert error["code"] == "not_found"
    assert "no-such-recipe" in error["message"]
