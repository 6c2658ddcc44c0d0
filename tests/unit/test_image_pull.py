"""Pulls from a reference to a stored image: names, repetition, cancellation, what is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.api.results import PrunedCache
from banger.config.paths import Paths
from banger.disk import space
from banger.disk.background import Job
from banger.errors import BangerError
from banger.image import cache as cache_module
from banger.image import find_image, list_images, verify_image
from banger.image import pull as pull_module
from banger.image.cache import prune_cache, using_scratch
from banger.image.pull import PullPlan, find_pulled, plan_pull, pull_image
from banger.progress import Silent
from fakes.registry import FakeRegistry, fake_registry
from oci_kit import Entry, Image, build_image, directory, layer_tar, write_archive, write_layout
from patience import PATIENCE_S

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="sqfstar is not installed"),
]

CONFIG = {
    "User": "app:web",
    "Env": ["PATH=/opt/bin"],
    "WorkingDir": "/srv",
    "Entrypoint": ["/run.sh"],
    "Cmd": ["serve"],
    "StopSignal": "SIGQUIT",
    "Volumes": {"/data": {}},
}
ENTRIES = [directory("etc"), Entry("etc/os-release", content=b"ID=alpine\n")]


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


def archive(root: Path, content: bytes = b"1", name: str = "app.tar") -> str:
    layers = [layer_tar(ENTRIES), layer_tar([Entry("new", content=content)])]
    layout = write_layout(root / os.urandom(4).hex(), build_image(layers, config=CONFIG))
    return f"oci-archive:{write_archive(root / name, layout)}"


def plan(
    reference: str,
    *,
    name: str | None = None,
    replace: bool = False,
    again: bool = False,
    limit: int = 1 << 30,
) -> PullPlan:
    return plan_pull(
        reference,
        default_registry="registry.invalid",
        kernel_ref="k",
        name=name,
        replace=replace,
        again=again,
        reserve_bytes=0,
        cache_limit_bytes=limit,
    )


async def prune(paths: Paths, *, dry_run: bool = False) -> PrunedCache:
    return await prune_cache(paths, limit_bytes=1 << 30, dry_run=dry_run)


def left_over(paths: Paths) -> list[str]:
    return [
        p.name
        for p in [*paths.images.glob(".*"), *paths.cache.glob("oci/fetch/*.part")]
        if not p.name.endswith(".lock")
    ]


async def test_an_archive_becomes_an_image_with_its_configuration(
    paths: Paths, tmp_path: Path
) -> None:
    reference = archive(tmp_path)
    image = await pull_image(paths, plan(reference), reporter=Silent())
    assert (image.name, image.distro, image.kernel_ref, image.managed) == (
        "app",
        "alpine",
        "k",
        True,
    )
    assert image.oci is not None
    assert (image.oci.user, image.oci.env) == ("app:web", ("PATH=/opt/bin",))
    assert (image.oci.entrypoint, image.oci.cmd) == (("/run.sh",), ("serve",))
    assert (image.oci.workdir, image.oci.stop_signal) == ("/srv", "SIGQUIT")
    assert image.oci.volumes == ("/data",)
    assert image.oci.reference == reference
    assert verify_image(paths, "app") == ()
    assert left_over(paths) == []


async def test_the_same_layers_make_the_same_bytes(paths: Paths, tmp_path: Path) -> None:
    reference = archive(tmp_path)
    one = await pull_image(paths, plan(reference, name="one"), reporter=Silent())
    two = await pull_image(paths, plan(reference, name="two"), reporter=Silent())
    assert one.rootfs_sha256 == two.rootfs_sha256


async def test_a_second_pull_of_an_unchanged_image_asks_once_and_keeps_it(
    paths: Paths, registry: FakeRegistry
) -> None:
    registry.add(build_image([layer_tar(ENTRIES)]), "v1")
    wanted = plan(f"{registry.host}/team/app:v1")
    first = await pull_image(paths, wanted, reporter=Silent())
    registry.asked.clear()
    second = await pull_image(paths, wanted, reporter=Silent())
    assert second == first
    assert [a.method for a in registry.asked] == ["HEAD"]
    assert find_pulled(paths, wanted) == first


async def test_a_tag_that_has_moved_is_said_and_replaced_on_request(
    paths: Paths, registry: FakeRegistry
) -> None:
    reference = f"{registry.host}/team/app:v1"
    registry.add(build_image([layer_tar(ENTRIES)]), "v1")
    first = await pull_image(paths, plan(reference), reporter=Silent())
    registry.add(build_image([layer_tar([*ENTRIES, Entry("more")])]), "v1")
    with pytest.raises(BangerError, match="older") as caught:
        await pull_image(paths, plan(reference), reporter=Silent())
    assert caught.value.hint == f"banger image pull --force {reference}"
    second = await pull_image(paths, plan(reference, replace=True), reporter=Silent())
    assert (second.name, second.id != first.id) == ("app-v1", True)
    assert [i.id for i in list_images(paths)] == [second.id]
    assert left_over(paths) == []


async def test_an_image_whose_file_was_damaged_is_made_again_on_request(
    paths: Paths, registry: FakeRegistry
) -> None:
    """`image verify` says that a forced pull mends it, also when its tag has not moved."""
    registry.add(build_image([layer_tar(ENTRIES)]), "v1")
    reference = f"{registry.host}/team/app:v1"
    first = await pull_image(paths, plan(reference), reporter=Silent())
    rootfs = Path(first.rootfs_path)
    data = bytearray(rootfs.read_bytes())
    data[200] ^= 1
    rootfs.chmod(0o644)
    rootfs.write_bytes(data)
    assert "sha256" in verify_image(paths, "app-v1")[0]
    # A VM that asks for the image replaces it only if it is another by now.
    same = await pull_image(paths, plan(reference, replace=True), reporter=Silent())
    assert same.id == first.id
    second = await pull_image(paths, plan(reference, replace=True, again=True), reporter=Silent())
    assert (second.id != first.id, verify_image(paths, "app-v1")) == (True, ())
    assert [i.id for i in list_images(paths)] == [second.id]


async def test_a_name_of_another_image_is_refused_with_a_way_out(
    paths: Paths, tmp_path: Path
) -> None:
    await pull_image(paths, plan(archive(tmp_path)), reporter=Silent())
    (tmp_path / "b").mkdir()
    with pytest.raises(BangerError) as caught:
        await pull_image(paths, plan(archive(tmp_path / "b")), reporter=Silent())
    assert caught.value.code == "already_exists"
    assert "--name" in (caught.value.hint or "")


async def test_two_pulls_of_one_image_at_once_do_the_work_once(
    paths: Paths, registry: FakeRegistry
) -> None:
    image = build_image([layer_tar(ENTRIES)])
    registry.add(image, "v1")
    wanted = plan(f"{registry.host}/team/app:v1")
    both = await asyncio.gather(*(pull_image(paths, wanted, reporter=Silent()) for _ in range(2)))
    assert both[0] == both[1]
    assert registry.count(f"/blobs/{image.layers[0]}") == 1


async def test_a_cancelled_pull_leaves_nothing(paths: Paths, registry: FakeRegistry) -> None:
    registry.add(build_image([layer_tar([Entry("big", content=os.urandom(1 << 20))])]), "v1")
    registry.hold = threading.Event()
    task = asyncio.create_task(
        pull_image(paths, plan(f"{registry.host}/team/app:v1"), reporter=Silent())
    )
    assert await asyncio.to_thread(registry.holding.wait, PATIENCE_S)
    task.cancel()
    # At once: the minute that a silent server gets is longer than this test may take.
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list_images(paths) == ()
    assert left_over(paths) == []


async def test_a_bad_image_leaves_nothing(paths: Paths, registry: FakeRegistry) -> None:
    registry.add(build_image([layer_tar(ENTRIES), layer_tar([Entry("../x")])]), "v1")
    with pytest.raises(BangerError) as caught:
        await pull_image(paths, plan(f"{registry.host}/team/app:v1"), reporter=Silent())
    assert caught.value.reason == "bad_image"
    assert find_image(paths, "app-v1") is None
    assert left_over(paths) == []


async def test_damage_in_the_cache_is_mended_by_the_pull_itself(
    paths: Paths, registry: FakeRegistry
) -> None:
    image = build_image([layer_tar(ENTRIES)])
    registry.add(image, "v1")
    reference = f"{registry.host}/team/app:v1"
    await pull_image(paths, plan(reference), reporter=Silent())
    blob = paths.oci_blobs / image.layers[0].removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[20] ^= 1
    blob.write_bytes(data)
    await pull_image(paths, plan(reference, name="again"), reporter=Silent())


async def test_pruning_counts_then_frees_and_stored_images_stay(
    paths: Paths, registry: FakeRegistry
) -> None:
    assert (await prune(paths)).blobs == 0
    registry.add(build_image([layer_tar(ENTRIES)]), "v1")
    await pull_image(paths, plan(f"{registry.host}/team/app:v1"), reporter=Silent())
    counted = await prune(paths, dry_run=True)
    freed = await prune(paths)
    assert (counted.blobs, counted.bytes) == (freed.blobs, freed.bytes)
    assert (counted.blobs, counted.bytes > 100) == (2, True)
    assert (await prune(paths, dry_run=True)).blobs == 0
    assert counted.limit_bytes == 1 << 30
    assert verify_image(paths, "app-v1") == ()


def big(content: int = 100_000) -> Image:
    """An image of one layer that does not compress."""
    return build_image([layer_tar([Entry("big", content=os.urandom(content))])])


async def test_pulls_keep_the_cache_below_its_limit(paths: Paths, registry: FakeRegistry) -> None:
    images = [big() for _ in range(4)]
    for number, image in enumerate(images):
        registry.add(image, f"v{number}")
        wanted = plan(f"{registry.host}/team/app:v{number}", limit=250_000)
        await pull_image(paths, wanted, reporter=Silent())
    names = {p.name for p in paths.oci_blobs.iterdir()}
    assert {image.layers[0].removeprefix("sha256:") for image in images[2:]} <= names
    assert sum(p.stat().st_size for p in paths.oci_blobs.iterdir()) <= 250_000
    # A limit that is smaller than the image does not keep it from being pulled.
    await pull_image(
        paths, plan(f"{registry.host}/team/app:v0", name="again", limit=1000), reporter=Silent()
    )
    assert sum(p.stat().st_size for p in paths.oci_blobs.iterdir()) <= 1000


class AtStage(Silent):
    """Does something in the pull's own thread when a stage begins."""

    def __init__(self, stage: str, work: Callable[[], None]) -> None:
        self._stage, self._work = stage, work

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        if stage == self._stage:
            self._work()


async def test_room_for_a_download_is_made_before_it(paths: Paths, registry: FakeRegistry) -> None:
    first, second = big(), big()
    registry.add(first, "v1")
    registry.add(second, "v2")
    reference = f"{registry.host}/team/app"
    await pull_image(paths, plan(f"{reference}:v1", limit=150_000), reporter=Silent())
    old = paths.oci_blobs / first.layers[0].removeprefix("sha256:")
    seen: list[bool] = []
    job = Job(AtStage("download", lambda: seen.append(old.exists())))
    wanted = plan(f"{reference}:v2", limit=150_000)
    await asyncio.to_thread(pull_module._pull, paths, wanted, job)
    assert seen == [False]


async def test_a_pull_in_the_middle_keeps_its_layers_when_others_prune(
    paths: Paths, registry: FakeRegistry
) -> None:
    registry.add(build_image([layer_tar([Entry("a")]), layer_tar([Entry("b")])]), "v1")
    pruned: list[PrunedCache] = []
    job = Job(AtStage("layers", lambda: pruned.append(asyncio.run(prune(paths)))))
    wanted = plan(f"{registry.host}/team/app:v1")
    await asyncio.to_thread(pull_module._pull, paths, wanted, job)
    assert [(done.blobs, done.in_use_blobs) for done in pruned] == [(0, 3)]
    assert (await prune(paths)).blobs == 3


@pytest.mark.parametrize("lacking", [1, 150_000, 10_000_000])
async def test_where_the_disk_is_full_unused_layers_go_before_a_pull_is_refused(
    paths: Paths, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    """As many as are needed, and none where that would not be enough."""
    images = [big() for _ in range(3)]
    for number, image in enumerate(images):
        registry.add(image, f"v{number}")
    reference = f"{registry.host}/team/app"
    for number in (0, 1):
        await pull_image(paths, plan(f"{reference}:v{number}"), reporter=Silent())

    def here() -> list[int]:
        names = {p.name for p in paths.oci_blobs.iterdir()}
        return [n for n, i in enumerate(images) if i.layers[0].removeprefix("sha256:") in names]

    def used() -> int:
        return sum(p.stat().st_size for p in paths.oci_blobs.iterdir())

    # What the cache has now, what the layer needs and a bit less make the disk that is simulated.
    total = used() + len(images[2].blobs[images[2].layers[0]]) - lacking
    real = pull_module.require_room

    def require_room(*words: Any, **named: Any) -> None:
        if str(named["doing"]).startswith("fetching"):
            real(*words, **named)

    monkeypatch.setattr(pull_module, "require_room", require_room)
    for module in (space, cache_module):
        monkeypatch.setattr(module, "free_bytes", lambda _: total - used())
    wanted = plan(f"{reference}:v2")
    if lacking > 1_000_000:
        with pytest.raises(BangerError) as caught:
            await pull_image(paths, wanted, reporter=Silent())
        assert (caught.value.reason, here()) == ("disk_full", [0, 1])
    else:
        await pull_image(paths, wanted, reporter=Silent())
        assert here() == ([1, 2] if lacking == 1 else [2])


async def test_what_a_killed_pull_unpacked_is_removed_and_what_one_uses_is_not(
    paths: Paths,
) -> None:
    left = paths.oci_blobs.parent / ".archive-0123abcd"
    left.mkdir(parents=True)
    with using_scratch(paths):
        assert not left.exists()
        mine = paths.oci_blobs.parent / ".archive-abcd0123"
        mine.mkdir()
        with using_scratch(paths):
            assert mine.exists()
        await prune(paths)
        assert mine.exists()
    await prune(paths)
    assert not mine.exists()


@pytest.mark.parametrize(
    ("reference", "platform"),
    [("a b", "linux/amd64"), ("a", "linux/arm64"), ("oci-archive:x.tar", "linux/amd64")],
)
async def test_what_cannot_be_pulled_is_refused_before_anything(
    reference: str, platform: str
) -> None:
    with pytest.raises(BangerError) as caught:
        plan_pull(reference, default_registry="registry.invalid", kernel_ref="k", platform=platform)
    assert caught.value.code == "bad_request"


class Killed(BaseException):
    """Nothing that follows happens."""


async def test_an_image_is_never_gone_while_it_is_replaced(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames: both are there, and the newer one has the name."""
    old = await pull_image(paths, plan(archive(tmp_path)), reporter=Silent())
    real = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name == old.id:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "rename", die)
    wanted = plan(archive(tmp_path, b"2"), replace=True)
    with pytest.raises(Killed):
        await pull_image(paths, wanted, reporter=Silent())
    monkeypatch.setattr(Path, "rename", real)
    manifest = paths.images / old.id / "manifest.json"
    aged = manifest.read_text().replace('"created_at": "2', '"created_at": "1')
    manifest.chmod(0o644)
    manifest.write_text(aged)
    assert len(list_images(paths)) == 2
    found = find_image(paths, "app")
    assert found is not None
    assert found.id != old.id
