"""Figures of workspaces: a repository in, a little of it again, the work back.

10,000 files of 10 kB with one commit. Ours are whole command lines of `vm workspace`; theirs is the
same directory through tar and ssh, there and back. The guest has no git, so a clone is not possible
there. Every run starts with a new directory in one running VM; removing it is outside the clock.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.bench.ground import Ground
from tests.bench.import_tree import make_repository
from tests.bench.measure import Figure, alternate, load, seconds

_FILE_BYTES = 10_000
_CHANGED = 10
_PLACE = "/root/work"
_TAR = "/root/tar"


def bring_in_and_back(ground: Ground, vm: str, runs: int) -> list[Figure]:
    """Prepare against `tar | ssh tar`, a second prepare against the first, export against
    `ssh tar | tar`."""
    root = ground.root / "worked-on"
    root.mkdir()
    make_repository(root, file_bytes=_FILE_BYTES)
    ssh = ground.ssh(vm)
    again: list[float] = []
    turn = 0

    def in_guest(script: str) -> None:
        ground.ok("vm", "exec", vm, "--", "sh", "-c", script)

    def prepare() -> float:
        return ground.time(
            "vm", "workspace", "prepare", "-q", vm, str(root), "--guest-path", _PLACE
        )

    def touch(directory: Path) -> None:
        for number in range(_CHANGED):
            file = directory / f"module{number:03}" / f"file{number * 50:05}.c"
            file.write_text(f"changed {turn}\n{file.read_text()[:5000]}")

    def ours() -> float:
        nonlocal turn
        turn += 1
        in_guest(f"rm -rf {_PLACE}; sync")
        took = prepare()
        touch(root)
        again.append(prepare())
        return took

    def tar_in() -> float:
        in_guest(f"rm -rf {_TAR}; mkdir {_TAR}; sync")
        took = seconds(
            lambda: _pipe(["tar", "-C", str(root), "-c", "."], [*ssh, f"tar -C {_TAR} -xf -"])
        )
        in_guest(f"rm -rf {_TAR}; sync")
        return took

    before = load()
    full, theirs = alternate(runs, ours, tar_in)
    edit = f"for i in 0 1 2 3 4 5 6 7 8 9; do echo $i >> {_PLACE}/module00$i/file00${{i}}50.c; done"
    in_guest(f"cd {_PLACE}; for f in module00*; do echo x >> $f/$(ls $f | head -n 1); done; {edit}")
    back = ground.root / "back"
    back.mkdir()
    export_load = load()

    def export() -> float:
        patch = str(back / "work.patch")
        return ground.time(
            "vm", "workspace", "export", "-q", vm, "--guest-path", _PLACE, "-o", patch
        )

    def tar_out() -> float:
        target = back / "tree"
        target.mkdir()
        took = seconds(
            lambda: _pipe(
                [*ssh, f"tar -C {_PLACE} --exclude=./.git -c ."], ["tar", "-C", str(target), "-x"]
            )
        )
        subprocess.run(["rm", "-rf", str(target)], check=True)
        return took

    exported, tarred = alternate(runs, export, tar_out)
    in_guest(f"rm -rf {_PLACE}; sync")
    return [
        Figure(
            key="prepare", title="first prepare of 10,000 files, 100 MB",
            against="tar piped into ssh tar", unit="s", aim=0.6, ours=full, theirs=theirs,
            load=before,
        ),
        Figure(
            key="prepare_again", title="prepare again, 10 of 10,000 files changed",
            against="the first prepare", unit="s", aim=0.05, ours=again[-runs:], theirs=full,
            load=before,
        ),
        Figure(
            key="export", title="export of some 20 of 10,000 files",
            against="ssh tar piped into tar", unit="s", aim=0.6, ours=exported, theirs=tarred,
            load=export_load,
        ),
    ]  # fmt: skip


def _pipe(source: list[str], sink: list[str]) -> None:
    with subprocess.Popen(source, stdout=subprocess.PIPE) as first:
        subprocess.run(sink, stdin=first.stdout, check=True)
    if first.returncode:
        raise RuntimeError(f"{source[0]} ended with status {first.returncode}")
