"""The blob cache under any sequence of pulls, evictions, crashes and damage, against a model."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from banger.disk.background import Job
from banger.oci.blobs import BlobStore
from banger.oci.eviction import evict

CONTENTS = [b"", b"a", b"b" * 10, b"c" * 100, b"d" * 100, b"e" * 1000]
BLOBS = {hashlib.sha256(c).hexdigest(): c for c in CONTENTS}
NAMES = st.sampled_from(sorted(BLOBS))
SETS = st.lists(NAMES, min_size=1, max_size=4, unique=True)


class Broken(Exception):
    """What a transfer ends with."""


class Cache(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.blobs = Path(self.place.name) / "oci" / "blobs" / "sha256"
        self.fetching = Path(self.place.name) / "oci" / "fetch"
        self.pulls: list[tuple[BlobStore, list[str]]] = []
        # The model: size of each blob, the least recently used first.
        self.there: dict[str, int] = {}
        self.fetched = 0

    def teardown(self) -> None:
        for store, _ in self.pulls:
            store.__exit__(None, None, None)
        self.place.cleanup()

    def _fetch(self, name: str, f: IO[bytes]) -> None:
        self.fetched += 1
        f.write(BLOBS[name])

    def _use(self, name: str) -> None:
        self.there.pop(name, None)
        self.there[name] = len(BLOBS[name])

    @rule(names=SETS)
    def pull(self, names: list[str]) -> None:
        store = BlobStore(self.blobs, Job())
        for name in names:
            whole = self.there.get(name) == len(BLOBS[name])
            before = self.fetched
            cached = store.ensure(
                f"sha256:{name}", len(BLOBS[name]), lambda f, name=name: self._fetch(name, f)
            )
            assert cached == whole
            assert self.fetched == before + (not whole)
            self._use(name)
        self.pulls.append((store, names))

    @rule(name=NAMES)
    def transfer_that_breaks(self, name: str) -> None:
        if name in self.there:
            return

        def fetch(f: IO[bytes]) -> None:
            f.write(BLOBS[name][:5])
            raise Broken

        with BlobStore(self.blobs, Job()) as store, pytest.raises(Broken):
            store.ensure(f"sha256:{name}", len(BLOBS[name]), fetch)
        assert not (self.fetching / f"{name}.part").exists()

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        store, _ = self.pulls.pop(data.draw(st.integers(0, len(self.pulls) - 1)))
        store.__exit__(None, None, None)

    @rule(name=NAMES, data=st.data())
    def crash(self, name: str, data: st.DataObject) -> None:
        """What the kernel does with the descriptors of a killed pull; its transfer stays."""
        if self.pulls:
            self.end(data)
        for directory in (self.blobs, self.fetching):
            directory.mkdir(parents=True, exist_ok=True)
        (self.fetching / f"{name}.part").write_bytes(BLOBS[name][:3])

    @rule(name=NAMES)
    def lose_power(self, name: str) -> None:
        """A blob whose name was written before its content."""
        held = {n for _, names in self.pulls for n in names}
        if name in held or not self.there.get(name):
            return
        st = os.stat(self.blobs / name)
        os.truncate(self.blobs / name, st.st_size // 2)
        os.utime(self.blobs / name, ns=(st.st_atime_ns, st.st_mtime_ns))
        self.there[name] = st.st_size // 2

    @rule(keep=st.sampled_from([0, 1, 50, 110, 250, 1200, 5000]), dry_run=st.booleans())
    def bring_down(self, keep: int, dry_run: bool) -> None:
        held = {n for _, names in self.pulls for n in names}
        total, gone, stuck = sum(self.there.values()), [], []
        for name, size in self.there.items():
            if total <= keep and keep:
                break
            if name in held:
                stuck.append(name)
            else:
                gone.append(name)
                total -= size
        done = evict(self.blobs, keep_bytes=keep, dry_run=dry_run)
        assert (done.blobs, done.bytes) == (len(gone), sum(self.there[n] for n in gone))
        assert (done.in_use_blobs, done.kept_bytes) == (len(stuck), total)
        if dry_run:
            return
        for name in gone:
            del self.there[name]
        assert list(self.fetching.glob("*.part")) == []

    @invariant()
    def there_is_what_the_model_says(self) -> None:
        found = {p.name: p.stat().st_size for p in self.blobs.glob("*")}
        assert found == self.there

    @invariant()
    def what_is_held_is_there_and_whole(self) -> None:
        for store, names in self.pulls:
            for name in names:
                assert name in self.there
                assert store.read(f"sha256:{name}") == BLOBS[name]


Cache.TestCase.settings = settings(
    max_examples=300 if "BANGER_SOAK" in os.environ else 30, stateful_step_count=25
)
TestCache = Cache.TestCase
