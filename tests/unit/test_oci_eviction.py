"""Evictions beside other processes and threads: what is in use, what a killed pull leaves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import pytest

from banger.disk.background import Job
from banger.oci import blobs as blobs_module
from banger.oci import eviction as eviction_module
from banger.oci.blobs import BlobStore
from banger.oci.eviction import evict
from patience import PATIENCE_S

CONTENTS = [bytes([i]) * 1000 for i in range(8)]
NAMES = [hashlib.sha256(c).hexdigest() for c in CONTENTS]
DIGESTS = [f"sha256:{n}" for n in NAMES]

# Holds one blob, is in the middle of a second, and says so.
PULL = """
import sys
from pathlib import Path
from banger.disk.background import Job
from banger.oci import blobs as blobs_module
from banger.oci import eviction as eviction_module
from banger.oci.blobs import BlobStore
held, coming = sys.argv[2:]
store = BlobStore(Path(sys.argv[1]), Job())
assert store.find(held, 1000)
def fetch(f):
    f.write(b"half")
    f.flush()
    print("ready", flush=True)
    sys.stdin.read()
store.ensure(coming, 1000, fetch)
"""


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    return tmp_path / "oci" / "blobs" / "sha256"


def fill(blobs: Path, *numbers: int) -> None:
    with BlobStore(blobs, Job()) as store:
        for n in numbers:
            store.ensure(DIGESTS[n], 1000, lambda f, n=n: f.write(CONTENTS[n]))


def there(blobs: Path) -> list[int]:
    return sorted(NAMES.index(p.name) for p in blobs.glob("*"))


def test_the_least_recently_used_go_first(blobs: Path) -> None:
    fill(blobs, 0, 1, 2, 3)
    fill(blobs, 0)  # used again
    done = evict(blobs, keep_bytes=2500)
    assert there(blobs) == [0, 3]
    assert (done.blobs, done.bytes, done.kept_bytes) == (2, 2000, 2000)


def test_a_clock_that_went_back_makes_nothing_immortal(blobs: Path) -> None:
    fill(blobs, 0, 1)
    future = time.time_ns() + 10**18
    os.utime(blobs / NAMES[0], ns=(future, future))
    fill(blobs, 0, 1)
    evict(blobs, keep_bytes=1000)
    assert there(blobs) == [1]


def test_what_is_no_blob_is_left_alone(blobs: Path) -> None:
    fill(blobs, 0)
    (blobs / "README").write_bytes(b"mine")
    (blobs / NAMES[1]).mkdir()
    (blobs / NAMES[2]).symlink_to("/etc/passwd")
    evict(blobs, keep_bytes=0)
    assert {p.name for p in blobs.iterdir()} == {"README", NAMES[1], NAMES[2]}


def test_a_pull_of_another_process_keeps_its_blobs_until_it_is_killed(blobs: Path) -> None:
    fill(blobs, 0, 1)
    part = blobs.parents[1] / "fetch" / f"{NAMES[2]}.part"
    with subprocess.Popen(
        [sys.executable, "-c", PULL, blobs, DIGESTS[0], DIGESTS[2]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as pull:
        assert pull.stdout and pull.stdout.readline() == b"ready\n"
        done = evict(blobs, keep_bytes=0)
        assert (there(blobs), done.in_use_blobs, part.exists()) == ([0], 1, True)
        pull.kill()
    assert (evict(blobs, keep_bytes=0).blobs, there(blobs), part.exists()) == (1, [], False)


def test_two_evictions_at_once_take_no_more_than_one_would(blobs: Path) -> None:
    for round_ in range(20):
        fill(blobs, *range(8))
        start = threading.Barrier(3)

        def bring_down() -> None:
            start.wait(PATIENCE_S)  # noqa: B023 - joined below
            evict(blobs, keep_bytes=4000)

        threads = [threading.Thread(target=bring_down) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert there(blobs) == [4, 5, 6, 7], round_


# The moments between two system calls


def test_a_blob_that_is_evicted_before_it_is_locked_is_not_found(
    blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(blobs, 0)
    real = blobs_module._share

    def share(fd: int) -> None:
        evict(blobs, keep_bytes=0)
        real(fd)

    monkeypatch.setattr(blobs_module, "_share", share)
    with BlobStore(blobs, Job()) as store:
        assert not store.find(DIGESTS[0], 1000)


def test_a_blob_that_has_just_appeared_is_in_use(
    blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        moved = real(path, target)
        evict(blobs, keep_bytes=0)
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    with BlobStore(blobs, Job()) as store:
        store.ensure(DIGESTS[0], 1000, lambda f: f.write(CONTENTS[0]))
        assert there(blobs) == [0]


def test_a_blob_that_was_fetched_again_meanwhile_is_not_the_one_to_evict(
    blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(blobs, 0)
    real = eviction_module._lock
    with BlobStore(blobs, Job()) as store:

        def lock(fd: int) -> bool:
            monkeypatch.setattr(eviction_module, "_lock", real)
            (blobs / NAMES[0]).unlink()  # as a pull does that finds it damaged
            store.ensure(DIGESTS[0], 1000, lambda f: f.write(CONTENTS[0]))
            return real(fd)

        monkeypatch.setattr(eviction_module, "_lock", lock)
        assert evict(blobs, keep_bytes=0).blobs == 0
        assert there(blobs) == [0]


def test_many_pulls_and_evictions_at_once(blobs: Path) -> None:
    """Every pull finds its blobs whole for as long as it holds them, whoever evicts meanwhile."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def pull(first: int) -> None:
        def fetch(f: IO[bytes], n: int) -> None:
            f.write(CONTENTS[n])

        for round_ in range(40):
            with BlobStore(blobs, Job()) as store:
                mine = [(first + round_ + i) % len(NAMES) for i in range(3)]
                for n in mine:
                    store.ensure(DIGESTS[n], 1000, lambda f, n=n: fetch(f, n))
                for n in mine:
                    assert store.read(DIGESTS[n]) == CONTENTS[n]
                    assert (blobs / NAMES[n]).exists()

    def guarded(work: object, *arguments: int) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except BaseException as e:
            errors.append(e)

    def bring_down() -> None:
        while not stop.is_set():
            evict(blobs, keep_bytes=2000)

    pulls = [threading.Thread(target=guarded, args=(pull, n)) for n in range(4)]
    evictions = [threading.Thread(target=guarded, args=(bring_down,)) for _ in range(2)]
    for thread in (*pulls, *evictions):
        thread.start()
    for thread in pulls:
        thread.join(PATIENCE_S)
    stop.set()
    for thread in evictions:
        thread.join(PATIENCE_S)
    assert errors == []
    assert not any(thread.is_alive() for thread in (*pulls, *evictions))
    evict(blobs, keep_bytes=2000)
    assert len(there(blobs)) == 2
