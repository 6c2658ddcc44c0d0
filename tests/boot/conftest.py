"""The ladder of boot tests: an installation, a running VM, and the host as it was before."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import PATIENCE_S, SMALL, Installation
from host.namespace import find_obstacle, own_namespace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.boot)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session", autouse=True)
def own_network() -> Iterator[None]:
    """Links and nft tables of this process's VMs are not those of another one beside it, nor of the
    host. Whoever is not root makes none."""
    if find_obstacle():
        yield
        return
    with own_namespace():
        yield


@pytest.fixture(scope="session")
def banger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation with kernel and image, and no VM."""
    number = os.getpid() % 200
    installation = Installation(
        tmp_path_factory.mktemp("b"), bridge=f"br-fc-t{number}", address=f"10.213.{number}.1"
    )
    installation.furnish()
    yield installation
    installation.close()


@pytest.fixture(scope="session")
def web(banger: Installation) -> Iterator[str]:
    """A VM that runs for many tests; they leave it as it was."""
    banger.ok("vm", "create", "--name", "web", *SMALL)
    banger.wait_for_sshd("web")
    yield "web"
    banger("vm", "delete", "web")


@pytest.fixture
def nothing_left(banger: Installation) -> Iterator[None]:
    """What the test made is gone afterwards."""
    before = banger.census()
    yield
    after = banger.census()
    assert after == before, f"before: {before}\nafter: {after}\n{banger.evidence()}"


@pytest.fixture
def cleaned(banger: Installation) -> Iterator[None]:
    """Images that the test made are deleted, and nothing half made is there."""
    before = {i["name"] for i in banger.json("image", "list", "--json")}
    yield
    for image in banger.json("image", "list", "--json"):
        if image["name"] not in before:
            banger.ok("image", "delete", image["name"])
    images = banger.state / "images"
    deadline = time.monotonic() + PATIENCE_S
    # A command that was interrupted has ended; its daemon gives everything back a moment later.
    while left := [p.name for p in images.iterdir() if p.is_dir() and p.name.startswith(".")]:
        assert time.monotonic() < deadline, left


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with the odd things that real ones have."""
    root = tmp_path / "project"
    root.mkdir()

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=T", "-c", "user.email=t@example.invalid", *words],
            cwd=root,
            check=True,
            capture_output=True,
        )

    git("init", "-q", "-b", "main")
    (root / "Makefile").write_text("test:\n\t@cat message; test -x run.sh; ./run.sh\n")
    (root / "message").write_text("committed\n")
    (root / "run.sh").write_text("#!/bin/sh\necho ran in $PWD\n")
    (root / "run.sh").chmod(0o755)
    (root / "a name with\nnewline").write_text("odd")
    (root / "link").symlink_to("message")
    (root / ".gitignore").write_text("ignored\n")
    (root / "sub").mkdir()
    (root / "sub" / "file").write_text("below")
    git("add", "-A")
    git("commit", "-qm", "first")
    (root / "message").write_text("edited\n")
    (root / "untracked").write_text("new")
    (root / "ignored").write_text("secret")
    return root
