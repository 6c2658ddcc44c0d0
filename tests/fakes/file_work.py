"""Operations on files alone, each with what is there before it and what its user must find after.

They run in children that may be killed (`fakes.forks`). A place is a directory: below it lie an
installation, a repository and what the operation works on.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from banger import faults
from banger.config.paths import Paths
from banger.daemon.leftovers import sweep_leftovers
from banger.disk.background import Job
from banger.image.build import _publish as publish_build
from banger.image.entries import delete_image, find_image, list_images, verify_image
from banger.image.pull import plan_pull, pull_image
from banger.image.recipe import load_recipe
from banger.image.register import promote_image, register_image
from banger.kernel import apt, pull
from banger.kernel.base_initrd import build_module_members, write_members
from banger.kernel.entries import delete_kernel, find_kernel, list_kernels, verify_kernel
from banger.kernel.pull import pull_kernel
from banger.progress import Silent
from banger.workspace.landed import HostFacts, apply_changes, read_changes
from banger.workspace.manifest import find_manifest, write_manifest
from banger.workspace.options import ShipOptions
from fakes.agent import Agent
from fakes.guest_files import GuestHost
from oci_kit import Entry, build_image, directory, layer_tar, write_archive, write_layout
from workspace_kit import commit, git, make_repository, write

KERNEL = "debian-6.12-cloud"
# A root filesystem by its first bytes; nothing mounts it.
SQUASHFS = b"hsqs" + bytes(92)


class Case(NamedTuple):
    """`prepare` makes what is there before; `act` is the operation, which may be repeated; `look`
    says what its user sees."""

    steps: tuple[str, ...]
    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    look: Callable[[Path], Any]


def paths_of(place: Path) -> Paths:
    return Paths(
        state=place / "state",
        cache=place / "cache",
        runtime=place / "run",
        config_file=place / "config.toml",
    )


# Images


def _archive(place: Path, content: bytes) -> None:
    layers = [
        layer_tar([directory("etc"), Entry("etc/os-release", content=b"ID=alpine\n")]),
        layer_tar([Entry("new", content=content)]),
    ]
    layout = write_layout(place / f"layout-{hashlib.sha256(content).hexdigest()[:8]}",
                          build_image(layers, config={}))  # fmt: skip
    write_archive(place / "app.tar", layout)


def _pull(place: Path, *, replace: bool = False) -> None:
    plan = plan_pull(
        f"oci-archive:{place / 'app.tar'}", default_registry="registry.invalid", kernel_ref="k",
        name="app", replace=replace, reserve_bytes=0,
    )  # fmt: skip
    asyncio.run(pull_image(paths_of(place), plan, reporter=Silent()))


def _first_archive(place: Path) -> None:
    paths_of(place).images.mkdir(parents=True)
    _archive(place, b"1")


def _second_archive(place: Path) -> None:
    _first_archive(place)
    _pull(place)
    _archive(place, b"2")


def look_at_images(place: Path) -> Any:
    paths = paths_of(place)
    return [
        (image.name, image.managed, image.rootfs_sha256, verify_image(paths, image.id))
        for image in list_images(paths)
    ]


def _rootfs(place: Path) -> None:
    paths_of(place).images.mkdir(parents=True)
    (place / "mine.sqfs").write_bytes(SQUASHFS)


def _register(place: Path) -> None:
    if find_image(paths_of(place), "mine") is None:
        asyncio.run(
            register_image(
                paths_of(place), name="mine", rootfs=place / "mine.sqfs", kernel_ref="k",
                distro="x", reporter=Silent(),
            )
        )  # fmt: skip


def _registered(place: Path) -> None:
    _rootfs(place)
    _register(place)


def _promote(place: Path) -> None:
    asyncio.run(promote_image(paths_of(place), "mine", reporter=Silent(), reserve_bytes=0))


def _discard_image(place: Path) -> None:
    if find_image(paths_of(place), "app") is not None:
        delete_image(paths_of(place), "app")


def _pulled(place: Path) -> None:
    _first_archive(place)
    _pull(place)


def _built(place: Path) -> None:
    paths_of(place).images.mkdir(parents=True)
    built = place / "built"
    built.mkdir()
    (built / "rootfs.sqfs").write_bytes(SQUASHFS)
    (built / "build.json").write_text('{"optional_missing":[]}')


def _build(place: Path) -> None:
    """As a build whose root filesystem lies in the cache."""
    paths = paths_of(place)
    if find_image(paths, "own") is None:
        recipe = load_recipe("debian-bookworm-minimal")
        publish_build(paths, recipe, "own", place / "built", Job(), None, lambda _: None)


# Kernels


def _kernel(place: Path, version: str, *, force: bool = False) -> None:
    (place / "agent").write_bytes(b"agent")

    def build(package: Path, target: Path, *, job: Job) -> None:
        (target / "vmlinux").write_text(f"kernel {version}")
        (target / "modules.sqfs").write_text("modules")
        (target / "release").write_text("6.12.1-cloud")
        write_members(target / "boot-modules.cpio", build_module_members({"a.ko": b"A"}))

    # Of this process, which ends with the operation.
    pull.agent_binary = lambda arch: place / "agent"
    apt.find_newest = lambda *a, **o: apt.KernelPackage(  # type: ignore[assignment]  # a fake
        name="linux", version=version, sha256="aa", size_bytes=1
    )
    apt.download = lambda package, at, *, job: at / "linux.deb"
    pull.build_entry_files = build
    if force or find_kernel(paths_of(place), KERNEL) is None:
        work = pull_kernel(
            paths_of(place), KERNEL, reporter=Silent(), force=force, reserve_bytes=0
        )  # fmt: skip
        asyncio.run(work)


def look_at_kernels(place: Path) -> Any:
    paths = paths_of(place)
    return [(k.name, k.kernel_version, verify_kernel(paths, k.name)) for k in list_kernels(paths)]


def _no_kernel(place: Path) -> None:
    paths_of(place).kernels.mkdir(parents=True)


def _old_kernel(place: Path) -> None:
    _no_kernel(place)
    _kernel(place, "1")


def _discard_kernel(place: Path) -> None:
    if find_kernel(paths_of(place), KERNEL) is not None:
        delete_kernel(paths_of(place), KERNEL)


# Workspaces

_OLD, _NEW, _MINE = b"as shipped\n", b"as the guest left it\n", b"the user's own\n"


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _changed_repository(place: Path) -> None:
    repository = place / "repo"
    for name in ("changed", "deep/changed", "gone", "deep/gone"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(_OLD)
    (repository / "mine").write_bytes(_MINE)
    (repository / ".git").mkdir()
    lines = [
        (f"100644 {_oid(_OLD)}", f"100644 {_oid(_NEW)}", "changed"),
        (f"100644 {_oid(_OLD)}", f"100644 {_oid(_NEW)}", "deep/changed"),
        ("0 -", f"100644 {_oid(_NEW)}", "deep/er/added"),
        (f"100644 {_oid(_OLD)}", "0 -", "deep/gone"),
        (f"100644 {_oid(_OLD)}", "0 -", "gone"),
    ]
    words = b"".join(f"{a} {b}\0{name}\0".encode() for a, b, name in lines) + b"\0"
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for _, after, name in lines:
            if after != "0 -":
                member = tarfile.TarInfo(name)
                member.size = len(_NEW)
                archive.addfile(member, io.BytesIO(_NEW))
    (place / "stream").write_bytes(words + tar.getvalue())


def _apply(place: Path) -> None:
    with (place / "stream").open("rb") as stream:
        changes = read_changes(stream)
        apply_changes(HostFacts(place / "repo", "sha1", True), changes, stream)


def look_at_files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_bytes().decode()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def look_at_applied(place: Path) -> Any:
    return look_at_files(place / "repo")


class _KeptGuest(GuestHost):
    """A guest below a place; what was put there is remembered as the daemon remembers it."""

    def __init__(self, place: Path) -> None:
        # The agent is the test's: it outlives what is killed here.
        agent = Agent.__new__(Agent)
        agent.socket = Path((place.parent / "agent-socket").read_text())
        super().__init__(agent, place)
        path = str(self.path())
        kept = find_manifest(place / "vm", path)
        if kept is not None:
            self.manifests[path] = kept

    @property
    def scratch(self) -> Path:
        path = self.root / "cache" / "scratch"
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        return path


def _repository(place: Path) -> None:
    repository = make_repository(place / "repo")
    write(repository, "a", b"1\n")
    write(repository, "deep/b", b"1\n")
    commit(repository)
    (place / "guest").mkdir()
    (place / "vm").mkdir()


def _prepare(place: Path) -> None:
    guest = _KeptGuest(place)
    done = guest.prepare(place / "repo", ShipOptions())
    write_manifest(place / "vm", done.manifest)


def _shipped_and_changed_on_the_host(place: Path) -> None:
    _repository(place)
    _prepare(place)
    write(place / "repo", "a", b"2\n")
    write(place / "repo", "c", b"new\n")
    commit(place / "repo")


def _shipped_and_changed_in_the_guest(place: Path) -> None:
    _repository(place)
    _prepare(place)
    (place / "guest/repo/a").write_bytes(_NEW)


def look_at_guest(place: Path) -> Any:
    there = place / "guest/repo"
    log = git(there, "log", "--format=%s").decode() if (there / ".git").exists() else ""
    return look_at_files(there), log


def _export(place: Path) -> None:
    patch, _ = _KeptGuest(place).patch(place / "repo")
    beside = place / "patch.new"
    beside.write_bytes(patch)
    beside.rename(place / "patch")


def look_at_patch(place: Path) -> Any:
    patch = place / "patch"
    return look_at_guest(place), patch.read_bytes().decode() if patch.exists() else None


_ARTEFACT = faults.STEPS["artefact"]
_PULL = (*faults.STEPS["pull"], *faults.STEPS["image"])
CASES = {
    "pull an image": Case(_PULL, _first_archive, _pull, look_at_images),
    "pull an image anew": Case(
        _PULL, _second_archive, lambda place: _pull(place, replace=True), look_at_images
    ),
    "publish a build": Case(faults.STEPS["image"], _built, _build, look_at_images),
    "register an image": Case(faults.STEPS["image"], _rootfs, _register, look_at_images),
    "promote an image": Case(faults.STEPS["promote"], _registered, _promote, look_at_images),
    "delete an image": Case(("discard.image",), _pulled, _discard_image, look_at_images),
    "pull a kernel": Case(
        (*_ARTEFACT, *faults.STEPS["kernel"]), _no_kernel,
        lambda place: _kernel(place, "1"), look_at_kernels,
    ),
    "pull a kernel anew": Case(
        (*_ARTEFACT, *faults.STEPS["kernel"]), _old_kernel,
        lambda place: _kernel(place, "2", force=True), look_at_kernels,
    ),
    "delete a kernel": Case(("discard.kernel",), _old_kernel, _discard_kernel, look_at_kernels),
    "apply": Case(faults.STEPS["apply"], _changed_repository, _apply, look_at_applied),
    "prepare": Case(faults.STEPS["prepare"], _repository, _prepare, look_at_guest),
    "prepare again": Case(
        faults.STEPS["prepare"], _shipped_and_changed_on_the_host, _prepare, look_at_guest
    ),
    "export": Case(
        faults.STEPS["export"], _shipped_and_changed_in_the_guest, _export, look_at_patch
    ),
}  # fmt: skip


# What a child is told


def prepare(name: str, place: str) -> None:
    """Make what is there before."""
    Path(place).mkdir()
    CASES[name].prepare(Path(place))


def act(name: str, place: str, order: str, marks: str) -> None:
    """The operation, with an order (or none), and what it has met, in `met.json`."""
    met = faults.arm([order] if order else [], marks=Path(marks) if order else None)
    try:
        CASES[name].act(Path(place))
    finally:
        document = {"steps": met.steps, "changes": met.changes}
        Path(marks, "met.json").write_text(json.dumps(document))


def recover(place: str) -> None:
    """As a daemon that starts."""
    sweep_leftovers(paths_of(Path(place)))


def look(name: str, place: str, answer: str) -> None:
    """What the user sees, as JSON in the file `answer`."""
    Path(answer).write_text(json.dumps(CASES[name].look(Path(place))))
