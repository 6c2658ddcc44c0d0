"""Pulls under control: what they tell while they run, cancelled anywhere, several at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.config.paths import Paths
from banger.disk.background import Job, JobCancelled
from banger.image import list_images, verify_image
from banger.image.pull import PullPlan, _pull, plan_pull, pull_image
from banger.progress import Silent
from banger.units import format_size
from fakes.registry import FakeRegistry, fake_registry
from oci_kit import Entry, Image, build_image, directory, layer_tar
from patience import PATIENCE_S

pytestmark = [
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed"),
]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        state=tmp_path / "state",
        cache=tmp_path / "cache",
        runtime=tmp_path / "run",
        config_file=tmp_path / "config.toml",
    )


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as fake:
        yield fake


def plan(reference: str) -> PullPlan:
    return plan_pull(
        reference, default_registry="registry.invalid", kernel_ref="k", reserve_bytes=0
    )


def image(*sizes: int) -> Image:
    """One layer that does not compress for each size."""
    return build_image(
        [
            layer_tar([directory(f"d{n}"), Entry(f"d{n}/f", content=os.urandom(size))])
            for n, size in enumerate(sizes)
        ]
    )


def left_over(paths: Paths) -> list[str]:
    """What a pull that was given up may not leave: whole layers in the cache it may."""
    places = [*paths.images.glob("*"), *paths.cache.glob("oci/fetch/*"), *paths.images.glob(".*")]
    return [p.name for p in places if not p.name.endswith(".lock")]


def programs() -> list[str]:
    """What this process has started, sqfstar and its wrappers, and has not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
            name = (stat.parent / "comm").read_text().strip()
        except OSError:
            continue
        if int(words[1]) == os.getpid() and words[0] != "Z" and name in ("sqfstar", "setsid"):
            found.append(name)
    return found


class CountingJob(Job):
    """Cancelled at its n-th look at the flag, as by a Ctrl-C at that very moment."""

    def __init__(self, ending: int | None = None) -> None:
        super().__init__()
        self._counting = threading.Lock()
        self._ending = ending
        self.looks = 0
        self.stages: list[str] = []

    def check(self) -> None:
        with self._counting:
            self.looks += 1
            now = self.looks == self._ending
        if now:
            self.cancel()
        super().check()

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.stages.append(stage)


def test_a_pull_that_is_cancelled_at_any_point_leaves_nothing_and_the_next_one_works(
    paths: Paths, registry: FakeRegistry
) -> None:
    registry.add(image(300_000), "v1")
    wanted = plan(f"{registry.host}/team/app:v1")
    seen: list[str] = []
    for ending in itertools.count(1):
        job = CountingJob(ending)
        try:
            _pull(paths, wanted, job)
            break  # it has no more points
        except JobCancelled:
            assert (list_images(paths), left_over(paths), programs()) == ((), [], []), ending
        seen.append(job.stages[-1] if job.stages else "")
        if "rootfs" not in job.stages:
            shutil.rmtree(paths.cache, ignore_errors=True)  # so that it is fetched again
    assert {"", "image", "download", "layers", "rootfs"} <= set(seen)
    assert verify_image(paths, wanted.name) == ()


@pytest.mark.asyncio
async def test_a_pull_tells_bytes_rate_and_what_is_cached(
    paths: Paths, registry: FakeRegistry
) -> None:
    both = image(300_000, 2_000_000)
    registry.add(both, "v2")
    stages: list[tuple[str, str]] = []
    progress: list[tuple[str, int, int | None, str]] = []

    class Listening(Silent):
        def stage(self, stage: str, label: str, detail: str = "") -> None:
            stages.append((stage, label))

        def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
            progress.append((stages[-1][0], done, total, detail))

    # One of the two layers is in the cache already.
    data = both.blobs[both.layers[0]]
    (paths.oci_blobs).mkdir(parents=True)
    (paths.oci_blobs / both.layers[0].removeprefix("sha256:")).write_bytes(data)
    await pull_image(paths, plan(f"{registry.host}/team/app:v2"), reporter=Listening())
    labels = dict(stages)
    assert list(labels) == ["image", "download", "layers", "rootfs", "publish"]
    missing = len(both.blobs[both.layers[1]])
    assert labels["download"] == f"fetching 1 layer, 1.9M, {format_size(len(data))} are cached"
    transfers = [row for row in progress if row[0] == "download"]
    assert transfers[-1][1:3] == (missing, missing)
    assert transfers[-1][3].startswith("1.9M of 1.9M, ") and transfers[-1][3].endswith("/s")
    assert all(0 <= done <= missing for _, done, _, _ in transfers)
    # The rest has figures too: bytes of layers read, files and bytes written.
    assert [row[1] == row[2] for row in progress if row[0] == "layers"][-1]
    assert progress[-1][0] == "rootfs"
    assert progress[-1][3] == "4 files, 2.2M"


@pytest.mark.asyncio
@pytest.mark.parametrize("stage", ["download", "rootfs"])
async def test_pulls_of_different_images_run_side_by_side(
    paths: Paths, registry: FakeRegistry, stage: str
) -> None:
    shared = layer_tar([Entry("shared", content=os.urandom(50_000))])
    images = [build_image([shared, layer_tar([Entry("own", content=bytes([n]))])]) for n in (1, 2)]
    for number, one in enumerate(images):
        registry.add(one, f"v{number}")
    # Nobody passes before the other is there: one after the other would never end.
    meeting = threading.Barrier(2, timeout=PATIENCE_S)

    def pull(number: int) -> None:
        job = Job()
        real = job.stage

        def meet(name: str, label: str, detail: str = "") -> None:
            real(name, label, detail)
            if name == stage:
                meeting.wait()

        job.stage = meet  # type: ignore[method-assign]
        _pull(paths, plan(f"{registry.host}/team/app:v{number}"), job)

    await asyncio.gather(*(asyncio.to_thread(pull, n) for n in range(2)))
    assert len(list_images(paths)) == 2
    # And what both need came once.
    assert registry.count(f"/blobs/{images[0].layers[0]}") == 1


@pytest.mark.asyncio
async def test_a_pull_that_waits_for_the_same_image_can_be_cancelled_alone(
    paths: Paths, registry: FakeRegistry
) -> None:
    registry.add(image(100_000), "v1")
    registry.hold = threading.Event()
    wanted = plan(f"{registry.host}/team/app:v1")
    first = asyncio.create_task(pull_image(paths, wanted, reporter=Silent()))
    assert await asyncio.to_thread(registry.holding.wait, PATIENCE_S)
    second = asyncio.create_task(pull_image(paths, wanted, reporter=Silent()))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    registry.hold.set()
    assert (await first).name == wanted.name
    assert registry.count("/manifests/") == 2  # the first one's HEAD and GET


@pytest.mark.asyncio
async def test_when_the_pull_that_others_wait_for_is_cancelled_one_of_them_does_the_work(
    paths: Paths, registry: FakeRegistry
) -> None:
    one = image(100_000)
    registry.add(one, "v1")
    registry.hold = threading.Event()
    wanted = plan(f"{registry.host}/team/app:v1")
    first = asyncio.create_task(pull_image(paths, wanted, reporter=Silent()))
    assert await asyncio.to_thread(registry.holding.wait, PATIENCE_S)
    others = [asyncio.create_task(pull_image(paths, wanted, reporter=Silent())) for _ in range(2)]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    registry.hold.set()
    made = await asyncio.gather(*others)
    assert made[0] == made[1]
    assert len(list_images(paths)) == 1
    assert left_over(paths) == [made[0].id]
