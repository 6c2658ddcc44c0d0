"""`vm cp` with a real VM: killed on the way, in and out, and asked for again."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

from boot.installation import Installation

_SIZE = 96 << 20
_DYING = str(Path(__file__).with_name("dying_command.py"))


def die_copying(banger: Installation, source: str, target: str, *, after: int) -> None:
    """`vm cp`, killed when so many bytes have passed."""
    argv = [sys.executable, _DYING, str(after), "vm", "cp", source, target]
    done = subprocess.run(argv, env=banger.env, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_copy_that_was_killed_goes_on_in_both_directions(
    banger: Installation, web: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(_SIZE))
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    die_copying(banger, str(source), f"{web}:big", after=_SIZE // 4)
    assert banger("vm", "exec", web, "--", "test", "-e", "big").status == 1
    again = banger.ok("vm", "cp", str(source), f"{web}:big")
    assert "were there already" in again.err
    there = banger.ok(
        "vm", "exec", web, "--", "sh", "-c", "sha256sum big; ls -A | grep -c banger; true"
    )
    assert there.text.split() == [expected, "big", "0"]
    back = tmp_path / "back"
    die_copying(banger, f"{web}:big", str(back), after=_SIZE // 4)
    assert not back.exists()
    again = banger.ok("vm", "cp", f"{web}:big", str(back))
    assert "were there already" in again.err
    assert back.read_bytes() == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "source"]
    banger.ok("vm", "exec", web, "--", "rm", "big")


def test_directory_is_whole_or_not_there_and_only_what_differs_goes_again(
    banger: Installation, web: str, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    number = random.Random(2)
    for at in range(60):
        path = tree / f"d{at % 6}" / f"f{at}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(number.randbytes(400_000))
    die_copying(banger, str(tree), f"{web}:tree", after=12 << 20)
    assert banger("vm", "exec", web, "--", "test", "-e", "tree").status == 1
    assert "were there already" in banger.ok("vm", "cp", str(tree), f"{web}:tree").err
    assert "copied: 0 files" in banger.ok("vm", "cp", f"{tree}/.", f"{web}:tree").err
    banger.ok("vm", "exec", web, "--", "sh", "-c", "echo new > tree/d0/f0")
    banger.ok("vm", "cp", f"{web}:tree", str(tmp_path / "back"))
    assert "copied: 0 files" in banger.ok("vm", "cp", f"{web}:tree/.", str(tmp_path / "back")).err
    differing = subprocess.run(
        ["diff", "-rq", tree, tmp_path / "back"], capture_output=True, text=True, check=False
    )
    assert differing.stdout.count("\n") == 1 and "f0" in differing.stdout
    banger.ok("vm", "exec", web, "--", "rm", "-r", "tree")
