"""The first commands that docs/workspaces.md and docs/sessions.md show, each as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import Done, Installation

_DOCS = Path(__file__).parents[2] / "docs"
_SIZES = """
[vm_defaults]
vcpu = 1
memory_mib = 512
disk_size = "512M"
system_overlay_size = "512M"
"""
# What takes the place of words that mean a program of the reader's own.
_PROGRAMS = {
    'agent "fix the parser"': "sh -c 'echo fixed >> message'",
    "npm run dev": "sh -c 'echo serving; exec sleep 1000'",
    "./import": "cat",
}


def _commands(page: str, heading: str) -> list[str]:
    """The lines of a section that begin with `banger` or `git`, without what explains them."""
    text = (_DOCS / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = []
    for line in text.splitlines():
        words = line.strip().removeprefix("$ ")
        if line != line.lstrip() or line.startswith("$ "):
            if words.startswith(("banger ", "git apply")):
                found.append(re.split(r"\s{3,}|\s+# ", words)[0])
    return found


@pytest.fixture
def small(banger: Installation) -> Iterator[None]:
    """The sizes that a command without options gets."""
    before = banger.config.read_text()
    banger.config.write_text(before + _SIZES)
    banger.stop_daemon()
    yield
    banger.config.write_text(before)
    banger.stop_daemon()


@pytest.fixture
def checkout(repository: Path) -> Path:
    """A checkout without uncommitted changes, and with something to make."""
    subprocess.run(["git", "checkout", "-q", "--", "."], cwd=repository, check=True)
    (repository / "Makefile").write_text("test:\n\t@cat message\n")
    for name in ("untracked", "ignored"):
        (repository / name).unlink()
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.invalid")
    for words in (("add", "-A"), ("commit", "-qm", "make")):
        subprocess.run(["git", *identity, *words], cwd=repository, check=True)
    return repository


def _say(banger: Installation, line: str, cwd: Path) -> Done:
    for program, stand_in in _PROGRAMS.items():
        line = line.replace(program, stand_in)
    line = line.removesuffix(" >/dev/null")
    if line.startswith("git"):
        subprocess.run(shlex.split(line), cwd=cwd, check=True)
        return Done(0, b"", "")
    words = shlex.split(line.partition(" < ")[0])[1:]
    return banger(*words, cwd=cwd, stdin=b"12\n" if " < " in line else b"")


def test_what_a_person_and_an_agent_type_does_what_it_says(
    banger: Installation, small: None, checkout: Path, nothing_left: None
) -> None:
    lines = _commands("workspaces.md", "Two minutes")
    assert len(lines) == 10, lines
    clone = checkout.parent / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout), str(clone)], check=True)
    shown: dict[str, Done] = {}
    for line in lines:
        place = clone if line.startswith("git") else checkout
        if line.startswith("git"):
            (clone / "task.patch").write_bytes((checkout / "task.patch").read_bytes())
        done = shown[line] = _say(banger, line, place)
        assert done.status == 0, f"{line}: {done.err}"
        if line == "banger vm ssh desk":
            banger.ok("vm", "exec", "desk", "--", "sh", "-c", "echo there >> message")
    assert b"+there" in shown["banger vm workspace diff desk"].out
    assert (checkout / "message").read_text().endswith("there\n")
    (made,) = (d for line, d in shown.items() if line.endswith("make test"))
    assert made.text.endswith("there\n")
    assert (clone / "message").read_text().endswith("fixed\n")
    banger.ok("vm", "delete", "desk")


def test_what_is_shown_of_sessions_does_what_it_says(
    banger: Installation, web: str, tmp_path: Path
) -> None:
    lines = _commands("sessions.md", "A command that goes on without you")
    assert len(lines) == 10, lines
    banger.ok("vm", "exec", web, "--", "sh", "-c", "cp /bin/cat /usr/local/bin/python3")
    listed = ""
    for line in lines:
        if line.endswith(" -f") or " attach " in line:
            continue  # they end with the session; test_sessions.py does what a person would do
        done = _say(banger, line, tmp_path)
        assert done.status == 0, f"{line}: {done.err}"
        if line == "banger vm session list web":
            listed = done.text
    assert re.search(r"^dev +running +\d+ ", listed, re.MULTILINE), listed
    assert banger.ok("vm", "session", "logs", web, "job", "-f").text == "12\n"
    assert "print(6 * 7)" in banger.ok("vm", "session", "logs", web, "repl").text
    banger.ok("vm", "session", "kill", web, "repl")
    for name in ("repl", "job"):
        banger.ok("vm", "session", "remove", web, name)
    banger.ok("vm", "exec", web, "--", "rm", "/usr/local/bin/python3")
