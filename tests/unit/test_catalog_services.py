"""The catalog's order (here, bundle, own source); images and kernels out of the user's files."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from banger.api import catalog as c
from banger.api import params as p
from banger.api.records import ImageConfig
from banger.catalog.index import bundle_name
from banger.catalog.published import find_published
from banger.config.paths import Paths
from banger.daemon import catalog, confinement, given, stored
from banger.daemon import container_images as containers
from banger.disk.cpio import read_members
from banger.errors import BangerError
from banger.image import build
from banger.image.entries import (
    check_image_files,
    find_image,
    find_manifest,
    list_images,
    verify_image,
    write_manifest,
)
from banger.image.published import export_image, pull_published
from banger.kernel import given as kernel_given
from banger.kernel import published as kernel_published
from banger.kernel import pull as kernel_pull
from banger.kernel.base_initrd import build_module_members, write_base_initrd
from banger.kernel.entries import find_kernel, list_kernels, verify_kernel
from banger.kernel.published import export_kernel
from banger.kernel.requirements import (
    find_missing_container_options,
    find_missing_options,
)
from banger.progress import Silent
from banger.zstd import bounded_decompressor
from fakes.publishing import (
    CATALOG_IMAGE,
    CATALOG_KERNEL,
    ELF,
    EXT4,
    SQUASHFS,
    VMLINUX,
    Place,
    Report,
    import_kernel,
    kernel_directory,
    needs_tools,
)
from fakes.web import serving
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    agent = tmp_path / "agent"
    agent.write_bytes(b"agent")
    for module in (kernel_pull, kernel_given, kernel_published):
        monkeypatch.setattr(module, "agent_binary", lambda arch: agent)
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as web:
        yield Place(tmp_path, web)


@pytest.fixture
def built(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipes that were built here; nothing is built for real."""
    names: list[str] = []

    async def record(paths: Paths, name: str, **_: Any) -> str:
        names.append(name)
        return f"built {name}"

    async def never(*_: Any) -> None:
        return

    monkeypatch.setattr(build, "ensure_image", record)
    monkeypatch.setattr(confinement, "refuse_build", never)
    return names


# --- the order ------------------------------------------------------------------------------------


async def test_an_image_that_is_published_comes_as_its_bundle(
    place: Place, built: list[str]
) -> None:
    entry = await place.publish_image()
    image = await catalog.obtain_image(place.daemon, "mine", place.report)
    assert (image.name, image.distro, image.kernel_ref, image.managed) == (
        "mine", "linux", CATALOG_KERNEL, True,
    )  # fmt: skip
    assert Path(image.rootfs_path).read_bytes() == SQUASHFS
    assert verify_image(place.daemon.paths, "mine") == ()
    check_image_files(place.daemon.paths, image)
    host = place.web.url.removeprefix("http://")
    assert place.report.lines[1] == f"image mine: its bundle from {host}, index version 1"
    assert (place.report.warnings, built, place.left_behind()) == ([], [], [])
    assert [f for f in place.web.asked if f.startswith("mine")] == [entry.file]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda place: place.web.missing.add("index.json"), "no such file"),
        (lambda place: place.web.replaced.update({"index.json": b"{}"}), "signature"),
        (lambda place: place.web.statuses.extend([403] * 9), "status 403"),
        (
            lambda place: place.web.replaced.update(
                {p.name: b"x" * p.stat().st_size for p in place.web.root.glob("*.zst")}
            ),
            "sha256",
        ),
    ],
    ids=["no index", "another index", "refused", "another bundle"],
)
async def test_without_a_bundle_the_recipe_is_built_and_the_reason_is_told(
    place: Place, built: list[str], damage: Callable[[Place], Any], words: str
) -> None:
    await place.publish_image(CATALOG_IMAGE)
    damage(place)
    await catalog.obtain_image(place.daemon, CATALOG_IMAGE, place.report)
    assert built == [CATALOG_IMAGE]
    assert words in place.report.warnings[0]
    assert "from its recipe" in place.report.lines[-1]
    assert place.left_behind() == []


@pytest.mark.parametrize(
    ("index", "why"), [(False, "no index_url is configured"), (True, "the index has no bundle")]
)
async def test_one_line_says_why_a_recipe_is_built(
    place: Place, built: list[str], index: bool, why: str
) -> None:
    await place.publish_image("another")
    daemon = place.client(index=index)
    await catalog.obtain_image(daemon, CATALOG_IMAGE, place.report)
    assert why in place.report.lines[-1]
    assert place.report.warnings == []
    assert built == [CATALOG_IMAGE]


async def test_what_is_nowhere_is_not_found_only_when_the_index_was_read(place: Place) -> None:
    await place.publish_image("mine")
    with pytest.raises(BangerError, match="did you mean 'mine'") as caught:
        await catalog.obtain_image(place.daemon, "mime", place.report)
    assert caught.value.code == "not_found"
    place.web.missing.add("index.json.minisig")
    with pytest.raises(BangerError, match="minisig: there is no such file"):
        await catalog.obtain_image(place.daemon, "mime", place.report)


async def test_pull_of_a_catalog_name_goes_before_references(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pull(*_: Any) -> str:
        return "reference"

    monkeypatch.setattr(containers, "image_pull", pull)
    await place.publish_image("mine")

    async def pull_it(**words: Any) -> Any:
        params = p.PullImage(**words)
        return await catalog.image_pull(place.daemon, place.report, params)  # type: ignore[arg-type]

    first = await pull_it(reference="mine")
    assert first.name == "mine"
    assert (await pull_it(reference="mine")).id == first.id
    assert place.report.lines[-1] == "image mine: it is here already"
    assert (await pull_it(reference="mine", name="other")).name == "other"
    assert (await pull_it(reference="mine", force=True)).id != first.id
    assert await pull_it(reference="unknown") == "reference"
    assert await pull_it(reference="mine:1.0") == "reference"
    with pytest.raises(BangerError, match="names its kernel itself"):
        await pull_it(reference="mine", kernel_ref="k")
    # Whoever keeps the index from being read does not choose where its images come from.
    place.web.replaced["index.json"] = b"{}"
    with pytest.raises(BangerError, match="signature"):
        await pull_it(reference="mine", force=True)
    assert await pull_it(reference="mine:1.0") == "reference"
    place.web.replaced.clear()
    place.vms = [
        SimpleNamespace(name="web", image_id=i.id) for i in list_images(place.daemon.paths)
    ]
    with pytest.raises(BangerError, match="used by web"):
        await pull_it(reference="mine", force=True)


async def test_a_cancelled_pull_ends_at_once_and_leaves_nothing(place: Place) -> None:
    entry = await place.publish_image()
    source = find_published(place.daemon.paths, place.daemon.settings)
    assert source is not None
    place.web.hold = threading.Event()
    pull = pull_published(place.daemon.paths, source, entry, name="mine", reporter=Silent())
    task = asyncio.create_task(pull)
    try:
        assert await asyncio.to_thread(place.web.holding.wait, PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        place.web.hold.set()
    assert (list_images(place.daemon.paths), place.left_behind()) == ((), [])


async def test_what_a_killed_pull_left_is_removed_by_the_next(place: Place) -> None:
    await place.publish_image()
    images = place.daemon.paths.images
    for name in (".pull-mine-00000000", ".pull-other-00000000"):
        (images / name).mkdir(parents=True)
    await catalog.obtain_image(place.daemon, "mine", place.report)
    assert place.left_behind() == [".pull-other-00000000"]


async def test_an_image_that_cannot_be_replaced_stays(place: Place) -> None:
    entry = await place.publish_image()
    image = await catalog.obtain_image(place.daemon, "mine", place.report)
    place.web.missing.add(entry.file)
    with pytest.raises(BangerError, match="no such file"):
        await catalog.image_pull(
            place.daemon,
            place.report,  # type: ignore[arg-type]
            p.PullImage(reference="mine", force=True),
        )
    assert list_images(place.daemon.paths) == (image,)


async def test_two_pulls_of_one_bundle_download_it_once(place: Place) -> None:
    entry = await place.publish_image()
    one, two = await asyncio.gather(
        *(catalog.obtain_image(place.daemon, "mine", Report()) for _ in range(2))
    )
    assert one == two
    assert [f for f in place.web.asked if f == entry.file] == [entry.file]


@pytest.mark.parametrize(
    "changes",
    [{"distro": "x"}, {"kernel_ref": "x"}, {"name": "x"}],
    ids=str,
)
async def test_a_bundle_whose_manifest_contradicts_the_index_is_refused(
    place: Place, changes: dict[str, str]
) -> None:
    entry = await place.publish_image()
    moved = bundle_name(changes.get("name", entry.name), entry.arch, entry.sha256)
    (place.web.root / entry.file).rename(place.web.root / moved)
    entry = msgspec.structs.replace(entry, file=moved, **changes)
    await place.publish(entry)
    with pytest.raises(BangerError, match="something else than the index") as caught:
        await catalog.obtain_image(place.daemon, entry.name, place.report)
    assert caught.value.reason == "bad_bundle"
    assert (list_images(place.daemon.paths), place.left_behind()) == ((), [])


@pytest.mark.parametrize(
    "members",
    [
        {"manifest.json": b"{}"},
        {"manifest.json": b"not json", "rootfs.sqfs": SQUASHFS},
        {"manifest.json": b'{"name":"mine","rootfs_file":"/etc/passwd"}', "rootfs.sqfs": SQUASHFS},
        {"rootfs.sqfs": SQUASHFS},
        {"vmlinux": VMLINUX, "manifest.json": b"{}"},
    ],
    ids=["no root", "no manifest", "a path", "nothing but a root", "a kernel"],
)
async def test_a_bundle_without_its_parts_is_refused(
    place: Place, members: dict[str, Path | bytes]
) -> None:
    from banger.catalog.bundle import write_bundle

    out = io.BytesIO()
    write_bundle(out.write, members, advance=lambda _: None)
    done = c.Exported(kind="image", name="mine", distro="x", arch="amd64", kernel_ref="k")
    await place.publish(place.bundle(out.getvalue(), done))
    with pytest.raises(BangerError) as caught:
        await catalog.obtain_image(place.daemon, "mine", place.report)
    assert caught.value.reason == "bad_bundle"
    assert (list_images(place.daemon.paths), place.left_behind()) == ((), [])


# --- register, promote, delete --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name"),
    [(SQUASHFS, "rootfs.sqfs"), (EXT4, "rootfs.ext4")],
    ids=["squashfs", "ext4"],
)
async def test_a_registered_file_is_used_in_place_until_it_is_promoted(
    place: Place, content: bytes, name: str
) -> None:
    file = place.file("root", content)
    image = await place.register(rootfs=str(file))
    assert (image.rootfs_path, image.managed, file.read_bytes()) == (str(file), False, content)
    promoted = await given.image_promote(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert (promoted.id, promoted.managed) == (image.id, True)
    assert Path(promoted.rootfs_path).name == name
    file.unlink()
    assert verify_image(place.daemon.paths, "mine") == ()
    again = await given.image_promote(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert again == promoted


async def test_deleting_a_registered_image_leaves_the_users_file(place: Place) -> None:
    image = await place.register()
    await stored.image_delete(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert find_image(place.daemon.paths, "mine") is None
    assert Path(image.rootfs_path).read_bytes() == SQUASHFS


async def test_a_registered_file_that_was_changed_is_not_promoted(place: Place) -> None:
    image = await place.register()
    Path(image.rootfs_path).write_bytes(SQUASHFS[:-1] + b"!")
    with pytest.raises(BangerError, match="is not what was registered") as caught:
        await given.image_promote(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert caught.value.reason == "files_changed"
    assert [f.name for f in (place.daemon.paths.images / image.id).iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("docker-archive:/srv/somebody/secret/app.tar:v1", "docker-archive:app.tar:v1"),
        ("oci:/srv/somebody/secret/layout/", "oci:layout"),
        ("registry.example/team/app:v1", "registry.example/team/app:v1"),
    ],
)
async def test_an_exported_image_does_not_tell_where_its_archive_lay(
    place: Place, reference: str, told: str
) -> None:
    record = await place.register()
    directory = place.daemon.paths.images / record.id
    manifest = find_manifest(directory)
    assert manifest is not None
    config = ImageConfig(reference=reference, digest="sha256:0")
    write_manifest(directory, msgspec.structs.replace(manifest, oci=config, description=reference))
    out = io.BytesIO()
    done = await export_image(place.daemon.paths, "mine", write=out.write, reporter=Silent())
    unpacked = bounded_decompressor().decompress(out.getvalue())
    assert b"somebody" not in unpacked
    assert done.description == told
    assert f'"reference": "{told}"'.encode() in unpacked


async def test_an_image_that_a_vm_uses_is_not_deleted(place: Place) -> None:
    image = await place.register()
    place.vms = [SimpleNamespace(name="web", image_id=image.id)]
    with pytest.raises(BangerError, match="used by web"):
        await stored.image_delete(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rootfs": "root.sqfs"}, "must be absolute"),
        ({"rootfs": "/nowhere/root"}, "no such file"),
        ({"rootfs": "/etc/passwd"}, "neither squashfs nor ext4"),
        ({"kernel_ref": None}, "it takes a kernel"),
        ({"kernel": "/vmlinux"}, "excludes"),
        ({"kernel_ref": None, "kernel": "vmlinux"}, "must be absolute"),
        ({"kernel_ref": None, "kernel": "/v", "initrd": "/i", "modules": "/m"}, "exclude each"),
        ({"kernel_ref": "nobody-knows-it"}, "no kernel 'nobody-knows-it'"),
        ({"name": "../x"}, "not allowed"),
    ],
)
async def test_what_cannot_be_registered_is_refused_by_its_reason(
    place: Place, changes: dict[str, Any], words: str
) -> None:
    place.daemon = place.client(index=False)
    with pytest.raises(BangerError, match=words):
        await place.register(**changes)
    assert list_images(place.daemon.paths) == ()


async def test_a_name_is_registered_once(place: Place) -> None:
    await place.register()
    with pytest.raises(BangerError) as caught:
        await place.register()
    assert caught.value.code == "already_exists"


# --- kernels --------------------------------------------------------------------------------------


@needs_tools
async def test_an_imported_kernel_is_complete_and_travels_as_a_bundle(
    place: Place, tmp_path: Path
) -> None:
    directory = kernel_directory(tmp_path)
    kernel = await import_kernel(place, directory)
    assert (kernel.release, kernel.source) == ("6.12.9-test", f"import:{directory}")
    assert verify_kernel(place.daemon.paths, "own") == ()
    with Path(kernel.initrd).open("rb") as f:
        members = {m.name: m for m in read_members(f)}
    assert "banger/ko/overlay.ko" in members
    assert "config" in place.report.warnings[0]
    listed = subprocess.run(
        ["unsquashfs", "-lc", kernel.modules], capture_output=True, check=True, text=True
    ).stdout
    assert "squashfs-root/kernel/fs/overlay.ko\n" in listed
    assert "build" not in listed.replace("builtin", "")

    out = io.BytesIO()
    done = await export_kernel(place.daemon.paths, "own", write=out.write, reporter=Silent())
    await place.publish(place.bundle(out.getvalue(), done))
    place.daemon.paths = place.paths("second")
    pulled = await catalog.obtain_kernel(place.daemon, "own", place.report)
    assert verify_kernel(place.daemon.paths, "own") == ()
    assert Path(pulled.initrd).read_bytes() == Path(kernel.initrd).read_bytes()
    assert pulled.source.startswith("bundle:own-amd64-")
    assert (pulled.release, pulled.agent_version) == (kernel.release, kernel.agent_version)
    assert place.left_behind() == []
    rows = await catalog.kernel_catalog(place.daemon, place.report, p.Empty())  # type: ignore[arg-type]
    own = next(k for k in rows.kernels if k.name == "own")
    assert (own.pulled, own.size_bytes) == (True, len(out.getvalue()))
    other = next(k for k in rows.kernels if k.name == CATALOG_KERNEL)
    assert (other.pulled, other.source.startswith("apt: ")) == (False, True)


@needs_tools
async def test_an_import_warns_of_what_containers_would_miss(place: Place, tmp_path: Path) -> None:
    directory = kernel_directory(tmp_path)
    needed = find_missing_options("") + find_missing_container_options("")
    options = [o.removesuffix("|m") for o in needed if o != "CONFIG_SECCOMP_FILTER=y"]
    (directory / "config").write_text("\n".join(options))
    await import_kernel(place, directory)
    assert place.report.warnings == [
        "containers inside a guest of the kernel own will miss CONFIG_SECCOMP_FILTER=y"
    ]


def lead_out(directory: Path) -> None:
    outside = directory.parent / "outside"
    outside.write_bytes(VMLINUX)
    (directory / "vmlinux").unlink()
    (directory / "vmlinux").symlink_to(outside)


def lead_out_of_modules(directory: Path) -> None:
    (directory / "modules/kernel/secret.ko").symlink_to("/etc/passwd")


def link_directory(directory: Path) -> None:
    (directory / "modules/kernel/more").symlink_to("/etc")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lead_out, "leads out of"),
        (lead_out_of_modules, "leads out of"),
        (link_directory, "link to a directory"),
        (lambda d: (d / "vmlinux").unlink(), "neither vmlinux nor vmlinuz"),
        (lambda d: (d / "vmlinux").write_bytes(ELF), "no Linux banner"),
        (lambda d: (d / "vmlinux").write_bytes(b"MZ" + bytes(5000)), "neither an ELF"),
        (lambda d: (d / "config").write_text("CONFIG_PCI=y\n"), "lacks CONFIG_ACPI=y"),
        (lambda d: shutil.rmtree(d / "modules/kernel"), "needs to boot"),
    ],
    ids=[
        "kernel link", "module link", "directory link", "no kernel", "no version", "no ELF",
        "config", "no module",
    ],
)  # fmt: skip
@needs_tools
async def test_a_directory_that_is_no_kernel_for_guests_is_refused(
    place: Place, tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    directory = kernel_directory(tmp_path)
    change(directory)
    with pytest.raises(BangerError, match=words):
        await import_kernel(place, directory)
    assert (list_kernels(place.daemon.paths), place.left_behind()) == ((), [])


@needs_tools
async def test_a_kernel_that_is_here_is_imported_again_only_by_force(
    place: Place, tmp_path: Path
) -> None:
    directory = kernel_directory(tmp_path, modules=False)
    (directory / "vmlinuz").symlink_to("vmlinux")  # a link within it is fine
    await import_kernel(place, directory)
    with pytest.raises(BangerError) as caught:
        await import_kernel(place, directory)
    assert caught.value.code == "already_exists"
    await import_kernel(place, directory, force=True)


@needs_tools
async def test_the_kernel_of_a_registered_image_goes_with_it(place: Place, tmp_path: Path) -> None:
    kernel = place.file("vm/vmlinux", VMLINUX)
    initrd = tmp_path / "base.img"
    write_base_initrd(initrd, agent=kernel, modules=build_module_members({"a.ko": b"A"}))
    image = await place.register(kernel_ref=None, kernel=str(kernel), initrd=str(initrd))
    assert image.kernel_ref == "mine-kernel"
    assert find_kernel(place.daemon.paths, "mine-kernel") is not None
    await stored.image_delete(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert list_kernels(place.daemon.paths) == ()


@needs_tools
async def test_the_kernel_of_a_registered_image_stays_while_another_image_boots_with_it(
    place: Place, tmp_path: Path
) -> None:
    kernel = place.file("vm/vmlinux", VMLINUX)
    initrd = tmp_path / "base.img"
    write_base_initrd(initrd, agent=kernel, modules=build_module_members({"a.ko": b"A"}))
    await place.register(kernel_ref=None, kernel=str(kernel), initrd=str(initrd))
    await place.register(name="other", kernel_ref="mine-kernel")
    await stored.image_delete(place.daemon, place.report, p.NameRef(name="mine"))  # type: ignore[arg-type]
    assert find_image(place.daemon.paths, "mine") is None
    assert find_kernel(place.daemon.paths, "mine-kernel") is not None


@needs_tools
async def test_no_link_leads_out_of_the_modules_of_a_registered_image(
    place: Place, tmp_path: Path
) -> None:
    directory = kernel_directory(tmp_path)
    (directory / "modules/modules.symbols").symlink_to("modules.builtin")  # within it is fine
    files = {"kernel": str(directory / "vmlinux"), "modules": str(directory / "modules")}
    await place.register(kernel_ref=None, name="first", **files)
    lead_out_of_modules(directory)
    with pytest.raises(BangerError, match="leads out of"):
        await place.register(kernel_ref=None, name="second", **files)
    assert [k.name for k in list_kernels(place.daemon.paths)] == ["first-kernel"]


@needs_tools
async def test_a_distributions_initrd_is_refused_with_what_to_give_instead(place: Place) -> None:
    kernel = place.file("vm/vmlinux", VMLINUX)
    initrd = place.file("vm/initrd.img", b"070701" + b"0" * 104)
    with pytest.raises(BangerError, match="--modules DIR"):
        await place.register(kernel_ref=None, kernel=str(kernel), initrd=str(initrd))
    assert (list_kernels(place.daemon.paths), list_images(place.daemon.paths)) == ((), ())


async def test_a_kernel_of_a_recipe_is_known_and_built_when_no_bundle_has_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    async def build_it(paths: Paths, plan: Any, **options: Any) -> Any:
        built.append((plan.name, plan.recipe.package, options["force"]))

    monkeypatch.setattr(catalog, "build_kernel", build_it)
    place.daemon = place.client(index=False)
    await catalog.obtain_kernel(place.daemon, "generic-6.12", place.report, force=True)
    assert built == [("generic-6.12", "linux-source-6.12", True)]
    assert place.report.lines[-1] == (
        "building the kernel generic-6.12, which takes minutes: no index_url is configured"
    )
    rows = await catalog.kernel_catalog(place.daemon, place.report, p.Empty())  # type: ignore[arg-type]
    (row,) = [k for k in rows.kernels if k.name == "generic-6.12"]
    assert (row.pulled, row.source) == (False, "built from apt: linux-source-6.12")
    await place.register(kernel_ref="generic-6.12")
    with pytest.raises(BangerError, match=r"did you mean 'generic-6\.12'"):
        await catalog.obtain_kernel(place.daemon, "generic-6.1", place.report)
