"""The figure of a repository's import: 10,000 files of 5 kB with their history in one pack.

Ours is what the daemon does in the workspace stage of `vm run PATH`, from the inspection of the
repository to the guest's answer that the tree is in place. Theirs is `tar | ssh tar` of the same
directory. Both go into a new directory of one running VM, which is removed outside the clock.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from pathlib import Path
from typing import BinaryIO

from banger.guest.client import GuestClient
from banger.vm.handles import find_handles, read_secrets
from banger.workspace.inspect import precheck
from banger.workspace.options import ShipOptions, ShipResult
from banger.workspace.pack import pack
from tests.bench.ground import Ground
from tests.bench.measure import Figure, alternate, load

_FILES = 10_000
_FILE_BYTES = 5_000
_PER_DIRECTORY = 50
_WORDS = 4_000
_IMPORT = "/root/import"


def make_repository(root: Path, *, files: int = _FILES, file_bytes: int = _FILE_BYTES) -> None:
    """Files that read, and compress, about like source text; the same bytes every time."""
    random_words = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz_"
    words = [
        "".join(random_words.choices(letters, k=random_words.randint(2, 12))) for _ in range(_WORDS)
    ]
    for number in range(files):
        directory = root / f"module{number // _PER_DIRECTORY:03}"
        directory.mkdir(parents=True, exist_ok=True)
        text = " ".join(random_words.choices(words, k=file_bytes // 5))
        lines = "\n".join(text[i : i + 79] for i in range(0, len(text), 79))
        (directory / f"file{number:05}.c").write_text(lines[:file_bytes])

    def git(*words: str) -> None:
        settings = [
            *("-c", "user.name=Bench"),
            *("-c", "user.email=bench@example.invalid"),
            # In the background it would get in the way of our own repack.
            *("-c", "gc.auto=0", "-c", "maintenance.auto=false"),
        ]
        subprocess.run(["git", *settings, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "files")
    git("repack", "-adq")


def import_repository(ground: Ground, vm: str, runs: int) -> list[Figure]:
    """The workspace stage against `tar | ssh tar`."""
    root = ground.root / "repository"
    root.mkdir()
    make_repository(root)
    ssh = ground.ssh(vm)
    paths = ground.paths.vm(ground.show(vm)["id"])
    handles = find_handles(paths)
    assert handles is not None
    client = GuestClient(handles.endpoint, read_secrets(paths).token)
    scratch = ground.root / "scratch"
    scratch.mkdir(mode=0o700)
    packing: list[float] = []

    def clean() -> None:
        ground.ok("vm", "exec", vm, "--", "sh", "-c", f"rm -rf {_IMPORT} && sync")

    async def ship() -> None:
        options = ShipOptions()
        repository = await asyncio.to_thread(precheck, root, options, scratch_parent=scratch)

        def write(out: BinaryIO) -> ShipResult:
            began = time.perf_counter()
            result = pack(repository, options, out, scratch_parent=scratch)
            packing.append(time.perf_counter() - began)
            return result

        sent, received = await client.put(_IMPORT, write)
        if (sent.stream_files, sent.stream_bytes) != (received.files, received.bytes):
            raise RuntimeError(f"sent {sent}, received {received}")

    def ours() -> float:
        began = time.perf_counter()
        asyncio.run(ship())
        took = time.perf_counter() - began
        clean()
        return took

    def theirs() -> float:
        line = f"mkdir {_IMPORT} && tar -C {_IMPORT} -xf -"
        began = time.perf_counter()
        with subprocess.Popen(
            ["tar", "-C", str(root), "-cf", "-", "."], stdout=subprocess.PIPE
        ) as tar:
            subprocess.run([*ssh, line], stdin=tar.stdout, check=True)
        took = time.perf_counter() - began
        if tar.returncode:
            raise RuntimeError(f"tar ended with status {tar.returncode}")
        clean()
        return took

    before = load()
    a, b = alternate(runs, ours, theirs)
    return [
        Figure(
            key="import",
            title="import of 10,000 files, 50 MB",
            against="tar piped into ssh tar",
            unit="s",
            aim=0.7,
            ours=a,
            theirs=b,
            load=before,
            parts={"packing_and_sending_s": sorted(packing)[len(packing) // 2]},
        )
    ]
