"""Figures of commands: a whole VM for `true`, a command in a running VM, and its output's speed."""

from __future__ import annotations

import hashlib
import shlex

from tests.bench.bare_machine import BareMachine
from tests.bench.ground import Ground
from tests.bench.measure import Figure, alternate, load, timed
from tests.boot.installation import SMALL

_BLOB_BYTES = 100_000_000
_BLOB = "/root/blob"


def run_true(ground: Ground, runs: int) -> list[Figure]:
    """`vm run --rm -- true` against the bare script."""
    # The first start of a daemon probes KVM and makes blank disks: not what is measured here.
    ground.time("vm", "run", "-q", "--rm", *SMALL, "--", "true")
    bare = BareMachine(ground)
    bare.open()
    before = load()
    try:
        ours, theirs = alternate(
            runs, lambda: ground.time("vm", "run", "-q", "--rm", *SMALL, "--", "true"), bare.run
        )
    finally:
        bare.close()
    return [
        Figure(
            key="run",
            title="vm run --rm -- true",
            against="bare script: same VMM, kernel, disks",
            unit="s",
            aim=1.25,
            ours=ours,
            theirs=theirs,
            load=before,
        )
    ]


def exec_true(ground: Ground, vm: str, runs: int) -> list[Figure]:
    """`vm exec VM -- true` against `ssh VM true`, a new connection each."""
    ssh = [*ground.ssh(vm), "true"]
    before = load()
    ours, theirs = alternate(
        runs, lambda: ground.time("vm", "exec", vm, "--", "true"), lambda: timed(ssh)
    )
    return [
        Figure(
            key="exec",
            title="vm exec VM -- true",
            against="ssh VM true",
            unit="s",
            aim=0.35,
            ours=ours,
            theirs=theirs,
            load=before,
        )
    ]


def read_file(ground: Ground, vm: str, runs: int) -> list[Figure]:
    """100 MB of incompressible bytes through `vm exec VM -- cat` against ssh, into a file."""
    script = f"head -c {_BLOB_BYTES} /dev/urandom > {_BLOB} && cat {_BLOB} > /dev/null && sync"
    ground.ok("vm", "exec", vm, "--", "sh", "-c", script)
    expected = ground.ok("vm", "exec", vm, "--", "sha256sum", _BLOB).text.split()[0]
    target = ground.root / "blob"

    def into_file(argv: list[str], env: dict[str, str] | None = None) -> float:
        with target.open("wb") as f:
            took = timed(argv, stdout=f, env=env)
        with target.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != expected:
                raise RuntimeError(f"{argv}: what arrived is not what was sent")
        target.unlink()
        return took

    before = load()
    ours, theirs = alternate(
        runs,
        lambda: into_file(ground.argv("vm", "exec", vm, "--", "cat", _BLOB), ground.env),
        lambda: into_file([*ground.ssh(vm), shlex.join(["cat", _BLOB])]),
    )
    ground.ok("vm", "exec", vm, "--", "rm", _BLOB)
    return [
        Figure(
            key="cat",
            title="vm exec VM -- cat, 100 MB (throughput)",
            against="ssh VM cat",
            unit="s",
            aim=1.0,
            throughput=True,
            ours=ours,
            theirs=theirs,
            load=before,
        )
    ]
