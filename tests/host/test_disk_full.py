"""The host's disk is full at every single write: a clear error, nothing partial, the next works.

On a real filesystem of a few MiB (`small_disk`). What asks for room beforehand is out of the way
here, since it is there so that this does not happen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.api.records import VmRecord
from banger.cli import bundles
from banger.cli.vm_workspace import _new_file
from banger.config.paths import Paths
from banger.daemon.log import start_logging
from banger.disk.blank import ensure_template
from banger.errors import BangerError
from banger.files import write_atomic
from banger.image.entries import find_image, list_images, verify_image
from banger.image.pull import plan_pull, pull_image
from banger.image.register import promote_image
from banger.kernel import given as kernel_given
from banger.kernel import published as kernel_published
from banger.kernel import pull as kernel_pull
from banger.kernel.entries import find_kernel, verify_kernel
from banger.progress import Silent
from banger.ssh.keys import ensure_owner_key
from banger.ssh.known_hosts import replace_host
from banger.store import database
from banger.store.vms import VmStore
from banger.units import MIB
from banger.vm.create import forget_vm
from banger_root.errors import HelperError
from banger_root.leases import Leases
from banger_root.ledger import Entry, Ledger
from fakes.building import BuildWorld
from fakes.kernel_pull import NAME, KernelWorld
from fakes.publishing import Place, import_kernel, kernel_directory, needs_tools
from fakes.registry import fake_registry
from fakes.web import serving
from fakes.world import World, make_templates
from host.conftest import build_plan
from host.namespace import census
from host.small_disk import SmallDisk, find_obstacle, small_disk
from oci_kit import Entry as TarEntry
from oci_kit import build_image, directory, layer_tar, write_archive, write_layout

pytestmark = [pytest.mark.host, pytest.mark.asyncio]
needs_sqfstar = pytest.mark.skipif(
    shutil.which("sqfstar") is None, reason="sqfstar is not installed"
)


_ASKING = ("vm.admission", "image.pull", "image.build", "image.register", "kernel.pull",
           "kernel.given", "catalog.published")  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    for module in _ASKING:
        monkeypatch.setattr(f"banger.{module}.require_space", lambda *_, **__: None)
    point = tmp_path / "small"
    point.mkdir()
    with small_disk(point) as disk:
        yield disk


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_templates(tmp_path_factory.mktemp("templates"))


def paths_on(disk: SmallDisk) -> Paths:
    return Paths(
        state=disk.path / "state",
        cache=disk.path / "cache",
        runtime=disk.path / "run",
        config_file=disk.path / "config.toml",
    )


# --- VMs ------------------------------------------------------------------------------------------


async def test_a_vm_is_created_whole_or_not_at_all(disk: SmallDisk, templates: Path) -> None:
    world = World(root=disk.path, templates=templates)
    try:
        other = await world.create("other", start=False)

        def seen() -> object:
            world.store.update(other.id, last_error=None)  # as somebody may who has room
            return world.census(), {n for n in _unfinished(disk) if not n.endswith("/known_hosts")}

        vm = await disk.fill_at_each_write(world.create, seen)
        assert vm.state == "running"
        assert world.alive(vm)
    finally:
        await world.close()


async def test_a_stopped_vm_stays_stopped_and_keeps_its_disks(
    disk: SmallDisk, templates: Path
) -> None:
    world = World(root=disk.path, templates=templates)
    try:
        made = await world.create(start=False)
        paths = world.paths.vm(made.id)
        paths.work.write_bytes(b"the user's own" * 1000)
        os.truncate(paths.work, made.work_disk_bytes)
        content = paths.work.read_bytes()

        def seen() -> object:
            vm = world.store.find(made.id)
            assert vm is not None
            return vm.state, world.census(), paths.work.read_bytes() == content

        vm = await disk.fill_at_each_write(lambda: world.start(made), seen)
        assert (vm.state, paths.work.read_bytes() == content) == ("running", True)
    finally:
        await world.close()


async def test_a_vm_can_be_deleted_to_make_room(disk: SmallDisk, templates: Path) -> None:
    world = World(root=disk.path, templates=templates)
    try:
        vm = await world.create(start=False)
        world.paths.vm(vm.id).work.write_bytes(bytes(MIB))
        disk.leave(0)
        await forget_vm(world.ctx, vm)
        assert world.census()["rows"] == world.census()["directories"] == []
    finally:
        await world.close()


async def test_a_template_is_made_whole(disk: SmallDisk) -> None:
    paths = paths_on(disk)

    async def make() -> Path:
        return ensure_template(paths, "work", 64 * MIB)

    template = await disk.fill_at_each_write(
        make, lambda: disk.names() - {"state", "state/templates"}
    )
    assert template.is_file()


# --- the database, and state files ----------------------------------------------------------------


def _record(name: str, address: str = "") -> VmRecord:
    return VmRecord(
        id=secrets.token_hex(16), name=name, state="created", image_id="i", image="debian",
        kernel="k", vcpu=1, memory_mib=512, overlay_bytes=1, work_disk_bytes=1, address=address,
        mac="", network="user", last_error="x" * 6000,
    )  # fmt: skip


async def test_the_database_takes_a_change_or_leaves_it(disk: SmallDisk) -> None:
    store = VmStore(database.open_database(disk.path / "banger.db"))
    names = (f"vm-{n}" for n in range(1 << 20))

    async def reserve() -> VmRecord:
        return store.reserve(next(names), None, frozenset(), _record)

    for _ in range(8):  # the log is used again and again, so one alone might find room in it
        vm = await disk.fill_at_each_write(reserve, store.list) if _ == 0 else await reserve()
        before = store.list()
        disk.leave(0)
        for text in ("y" * 8000, "z" * 16000):
            try:
                store.update(vm.id, last_error=text)
            except BangerError as e:
                assert (e.reason, e.hint is not None) == ("disk_full", True)
                assert store.list() == before
            before = store.list()
        disk.empty()
    store.update(vm.id, last_error="there is room again")
    store.close()
    connection = database.open_database(disk.path / "banger.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    (text,) = connection.execute("SELECT record FROM vms WHERE id = ?", (vm.id,)).fetchone()
    assert "there is room again" in text
    connection.close()


async def test_a_database_is_opened_and_migrated_whole(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tmp_path / "migrations"
    shutil.copytree(database._MIGRATIONS, steps)
    old = VmStore(database.open_database(tmp_path / "old.db"))
    vms = [old.reserve(f"vm-{n}", None, frozenset(), _record) for n in range(30)]
    old.close()
    (steps / "0002_more.sql").write_text(
        "ALTER TABLE vms ADD COLUMN more TEXT;\nUPDATE vms SET more = record;\n"
        "CREATE INDEX vms_more ON vms (more);\n"
    )
    monkeypatch.setattr(database, "_MIGRATIONS", steps)
    path = disk.path / "banger.db"
    shutil.copy(tmp_path / "old.db", path)

    async def opened() -> sqlite3.Connection:
        return database.open_database(path)

    def seen() -> object:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as look:
            version = look.execute("PRAGMA user_version").fetchone()
            rows = look.execute("SELECT id FROM vms ORDER BY id").fetchall()
        return version, rows, disk.names() - {"banger.db.version-1"}

    connection = await disk.fill_at_each_write(opened, seen)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert len(connection.execute("SELECT more FROM vms").fetchall()) == len(vms)
    connection.close()
    assert (
        len(sqlite3.connect(database.copy_path(path, 1)).execute("SELECT id FROM vms").fetchall())
        == 30
    )


async def test_state_files_are_the_old_ones_or_the_new_ones(disk: SmallDisk) -> None:
    path = disk.path / "state.json"
    write_atomic(path, b"old" * 3000)

    async def write() -> None:
        write_atomic(path, b"new" * 20000)

    await disk.fill_at_each_write(write, lambda: (path.read_bytes(), disk.names()))
    assert path.read_bytes() == b"new" * 20000


async def test_known_hosts_and_the_owners_key_are_whole(disk: SmallDisk) -> None:
    ssh = disk.path / "ssh"
    ssh.mkdir(mode=0o700)
    (ssh / ".lock").touch()

    async def key() -> str:
        return ensure_owner_key(ssh / "id_ed25519")

    def seen() -> object:
        # The public half of a key that never came to be is replaced with it.
        return disk.names() - {"ssh/id_ed25519.pub"}

    assert (await disk.fill_at_each_write(key, seen)).startswith("ssh-ed25519 ")
    known = ssh / "known_hosts"

    async def host() -> None:
        replace_host(known, ["web.vm", "172.16.0.2"], "ssh-ed25519 AAAA web")

    await disk.fill_at_each_write(host, disk.names)
    assert known.read_text() == "web.vm,172.16.0.2 ssh-ed25519 AAAA\n"


async def test_the_helpers_ledger_is_whole(disk: SmallDisk) -> None:
    ledger = Ledger(str(disk.path / "leases"))
    plan = build_plan(2)
    entry = Entry(
        plan=plan,
        tap="tap-fc-" + plan.vm_id[:8],
        state="ready",
        held=(),
        created_at=1.0,
        owner_uid=0,
    )

    async def save() -> None:
        ledger.save(entry)

    def seen() -> object:
        ledger.tidy()
        return ledger.entries(), disk.names()

    await disk.fill_at_each_write(save, seen)
    assert ledger.entries() == ([entry], [])
    ledger.close()


async def test_a_lease_is_made_or_nothing_of_it(disk: SmallDisk, namespace: None) -> None:
    ledger = Ledger(str(disk.path / "leases"))
    leases = Leases(ledger, owner_uid=0)
    plan = build_plan(2)

    async def prepare() -> None:
        try:
            leases.prepare(plan)
        except HelperError as e:
            raise BangerError("operation_failed", str(e), hint=e.hint, reason=e.reason) from None

    def seen() -> object:
        ledger.tidy()
        return census(), ledger.entries(), disk.names()

    before = seen()
    await disk.fill_at_each_write(prepare, seen)
    assert [e.id for e in ledger.entries()[0]] == [plan.vm_id]
    disk.leave(0)
    leases.release(plan.vm_id)  # which a full disk does not keep
    disk.empty()
    assert seen() == before
    ledger.close()


async def test_a_log_that_cannot_be_written_stops_nothing_and_goes_on_later(
    disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        start_logging(disk.path / "bangerd.log", "info")
        disk.leave(0)
        for n in range(50):
            logging.getLogger("banger").info("line %d %s", n, "x" * 1000)
        disk.empty()
        logging.getLogger("banger").info("there is room again")
        assert "there is room again" in (disk.path / "bangerd.log").read_text()
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        root.handlers, root.level = handlers, level
    assert "No space left" in capsys.readouterr().err


# --- images and kernels ---------------------------------------------------------------------------

LAYERS = [
    [directory("etc"), TarEntry("etc/os-release", content=b"ID=alpine\n")],
    [TarEntry("big", content=os.urandom(30_000))],
]


@needs_sqfstar
@pytest.mark.parametrize("source", ["archive", "registry"])
async def test_a_pulled_image_is_whole(disk: SmallDisk, tmp_path: Path, source: str) -> None:
    image = build_image([layer_tar(entries) for entries in LAYERS])
    paths = paths_on(disk)
    with fake_registry() as registry:
        if source == "archive":
            archive = write_archive(tmp_path / "a.tar", write_layout(tmp_path / "layout", image))
            reference = f"oci-archive:{archive}"
        else:
            registry.add(image, "v1")
            reference = f"{registry.host}/team/app:v1"
        plan = plan_pull(
            reference, default_registry="r.invalid", kernel_ref="k", name="app", reserve_bytes=0
        )
        await disk.fill_at_each_write(
            lambda: pull_image(paths, plan, reporter=Silent()),
            lambda: (list_images(paths), _unfinished(disk)),
        )
    assert verify_image(paths, "app") == ()


def _unfinished(disk: SmallDisk) -> set[str]:
    """Whole blobs stay for the next try, as do empty directories; nothing else does."""
    return {
        name
        for name in disk.names()
        if not (disk.path / name).is_dir() and "oci/blobs/sha256/" not in name
    }


@needs_sqfstar
async def test_a_built_image_is_whole(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = BuildWorld(tmp_path, monkeypatch)
    world.paths = paths_on(disk)
    await disk.fill_at_each_write(
        world.build, lambda: (find_image(world.paths, "small"), _unfinished(disk) - _cached(disk))
    )
    assert verify_image(world.paths, "small") == ()


def _cached(disk: SmallDisk) -> set[str]:
    """A whole artefact in the build cache is for the next try."""
    return {name for name in disk.names() if name.startswith("cache/build/") and "/." not in name}


async def test_a_pulled_kernel_is_whole(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = KernelWorld(tmp_path, monkeypatch)
    world.paths = paths_on(disk)
    await disk.fill_at_each_write(
        world.pull,
        lambda: (find_kernel(world.paths, NAME), _unfinished(disk) - _cached(disk)),
    )
    assert verify_kernel(world.paths, NAME) == ()


@pytest.fixture
def place(tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Its client lives on the small disk."""
    agent = tmp_path / "agent"
    agent.write_bytes(b"agent" * 1000)
    for module in (kernel_pull, kernel_given, kernel_published):
        monkeypatch.setattr(module, "agent_binary", lambda arch: agent)
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as web:
        place = Place(tmp_path, web)
        place.daemon.paths = paths_on(disk)
        yield place


@needs_tools
async def test_an_imported_kernel_is_whole(place: Place, disk: SmallDisk, tmp_path: Path) -> None:
    given = kernel_directory(tmp_path)
    paths = place.daemon.paths
    await disk.fill_at_each_write(
        lambda: import_kernel(place, given), lambda: (find_kernel(paths, "own"), _unfinished(disk))
    )
    assert verify_kernel(paths, "own") == ()


async def test_a_registered_and_a_promoted_image_are_whole(place: Place, disk: SmallDisk) -> None:
    paths = place.daemon.paths
    await disk.fill_at_each_write(
        place.register, lambda: (find_image(paths, "mine"), _unfinished(disk))
    )
    await disk.fill_at_each_write(
        lambda: promote_image(paths, "mine", reporter=Silent(), reserve_bytes=0),
        lambda: (find_image(paths, "mine"), _unfinished(disk)),
    )
    image = find_image(paths, "mine")
    assert image is not None
    assert image.managed
    assert verify_image(paths, "mine") == ()


async def test_an_image_from_a_bundle_is_whole(place: Place, disk: SmallDisk) -> None:
    from banger.catalog.published import find_published
    from banger.daemon import catalog

    await place.publish_image()
    assert find_published(place.daemon.paths, place.daemon.settings) is not None
    paths = place.daemon.paths
    await disk.fill_at_each_write(
        lambda: catalog.obtain_image(place.daemon, "mine", place.report),
        lambda: (find_image(paths, "mine"), _unfinished(disk) - {"state/index-seen.json"}),
    )
    assert verify_image(paths, "mine") == ()


# --- what the command line writes -----------------------------------------------------------------


async def test_a_bundle_that_is_written_is_whole(
    place: Place, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.image.published import export_image

    place.daemon.paths = place.paths("client")
    await place.register()
    out = io.BytesIO()
    done = await export_image(place.daemon.paths, "mine", write=out.write, reporter=Silent())
    monkeypatch.setattr(bundles, "Server", lambda: _Streams(out.getvalue(), done))
    output = disk.path / "out"
    output.mkdir()

    async def export() -> None:
        bundles.export(
            "image.export", "mine", output=output, index=None, sign_key=None, as_json=True,
            quiet=True,
        )  # fmt: skip

    await disk.fill_at_each_write(export, disk.names)
    (file,) = output.iterdir()
    assert file.read_bytes() == out.getvalue()


class _Streams:
    """A daemon that sends one bundle."""

    def __init__(self, data: bytes, done: Any) -> None:
        import msgspec

        self.frames = lambda: (data[i : i + 4096] for i in range(0, len(data), 4096))
        self.result_payload = msgspec.json.encode(done)

    def stream(self, *_: Any) -> _Streams:
        return self

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *_: object) -> None:
        return


async def test_a_patch_that_is_written_is_whole(disk: SmallDisk) -> None:
    path = disk.path / "work.patch"
    path.write_bytes(b"an older patch")

    async def export() -> None:
        with _new_file(path) as write:
            for _ in range(30):
                write(b"diff --git " * 500)

    await disk.fill_at_each_write(export, lambda: (path.read_bytes(), disk.names()))
    assert path.read_bytes() == b"diff --git " * 15000
