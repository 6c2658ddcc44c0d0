"""The catalog as the daemon offers it: what is here, else a published bundle, else made here.

The catalog is what banger ships (recipes, kernels with their sources) and what the configured index
lists. Whoever asks hears in one line what was chosen and why.
"""

from __future__ import annotations

import asyncio
import difflib
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from banger.api import catalog as c
from banger.api import params as p
from banger.catalog.index import Index, IndexEntry, Kind
from banger.catalog.published import Published
from banger.daemon import confinement, container_images, image_builds
from banger.disk.background import run_job
from banger.errors import BangerError
from banger.image import build
from banger.image.entries import find_image, list_images
from banger.image.recipe import list_recipes, load_recipe
from banger.kernel.build import build_kernel, plan_build
from banger.kernel.build_recipe import find_build_recipe, list_build_recipes
from banger.kernel.entries import list_kernels, refuse_existing
from banger.kernel.pull import CATALOG, ensure_kernel, find_catalog_kernel, pull_kernel
from banger.oci.reference import is_explicit
from banger.progress import Silent

if TYPE_CHECKING:
    from banger.api.records import ImageRecord, KernelRecord
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter
    from banger.rpc.server import Call


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What a look at the index gave. Without a `source` none is configured."""

    source: Published | None = None
    index: Index | None = None
    problem: BangerError | None = None

    def find(self, kind: Kind, name: str) -> IndexEntry | None:
        return self.index.find(kind, name) if self.index else None

    def names(self, kind: Kind) -> tuple[str, ...]:
        entries = self.index.entries if self.index else ()
        return tuple(e.name for e in entries if e.kind == kind)

    @property
    def why_not(self) -> str:
        """Why there is no bundle of something that it does not have."""
        if self.problem is not None:
            return str(self.problem)
        return "the index has no bundle of it" if self.index else "no index_url is configured"


async def look(daemon: Daemon, report: Reporter) -> Looked:
    """Fetch the index, where one is configured; a failure is part of the answer."""
    if not daemon.settings.index_url:
        return Looked()
    # With HTTP and TLS, which a daemon without an index never needs.
    from banger.catalog.published import find_published, read_index

    source = find_published(daemon.paths, daemon.settings)
    assert source is not None
    try:
        index = await run_job(lambda job: read_index(source, job), report)
    except BangerError as e:
        return Looked(source=source, problem=e)
    return Looked(source=source, index=index)


async def obtain_image(
    daemon: Daemon,
    name: str,
    report: Reporter,
    *,
    as_name: str | None = None,
    replaced: ImageRecord | None = None,
) -> ImageRecord:
    """A catalog image that is not here: its bundle, else built from its recipe.

    `replaced` is an image that may go; it stays until there is another one for its name.

    Raises:
        BangerError: not_found, with the nearest name, only when neither index nor recipes have it;
            what kept a bundle from coming, when there is no recipe.
    """
    recipes = list_recipes()
    looked = await look(daemon, report)
    target = as_name or name
    problem = looked.problem
    why = looked.why_not
    entry = looked.find("image", name)
    if entry is not None and looked.source is not None and looked.index is not None:
        from banger.image.published import pull_published

        report.stage("resolve_image", f"image {name}: {_chosen(looked.source, looked.index)}")
        try:
            return await pull_published(
                daemon.paths,
                looked.source,
                entry,
                name=target,
                reporter=report,
                replaced=replaced,
                refuse=partial(container_images.refuse_in_use, daemon),
            )
        except BangerError as e:
            problem, why = e, str(e)
    if name in recipes:
        if problem is not None:
            report.warn(f"no bundle of the image {name}, so it is built here: {problem}")
            why = "its bundle could not be had"
        report.stage("resolve_image", f"building the image {name} from its recipe: {why}")
        if not load_recipe(name).recipe.bootstrapped:
            return await _build_in_machine(daemon, name, report, target, replaced)
        await confinement.refuse_build(daemon.paths, load_recipe(name), target)
        if as_name is None and replaced is None:
            # Not `build_image`: a peer that has just finished the same one is success here.
            return await build.ensure_image(daemon.paths, name, reporter=report)
        return await build.build_image(
            daemon.paths,
            load_recipe(name),
            name=target,
            reporter=report,
            replaced=replaced,
            refuse=partial(container_images.refuse_in_use, daemon),
        )
    if problem is not None:
        raise problem
    known = [*recipes, *looked.names("image"), *(i.name for i in list_images(daemon.paths))]
    raise _unknown("image", name, known, hint="banger image list")


async def _build_in_machine(
    daemon: Daemon, name: str, report: Reporter, target: str, replaced: ImageRecord | None
) -> ImageRecord:
    # Of two who want it at once, the second takes what the first has made.
    async with daemon.image_locks.setdefault(target, asyncio.Lock()):
        found = find_image(daemon.paths, target)
        if found is not None and (replaced is None or found.id != replaced.id):
            return found
        return await image_builds.build_in_machine(
            daemon, report, load_recipe(name), build.NO_EXTRAS, name=target, replaced=replaced
        )


async def obtain_kernel(
    daemon: Daemon, name: str, report: Reporter, *, force: bool = False
) -> KernelRecord:
    """A catalog kernel: its bundle, else from its own source. With `force` also when it is here.

    Raises:
        BangerError: as `obtain_image`.
    """
    looked = await look(daemon, report)
    problem = looked.problem
    why = looked.why_not
    entry = looked.find("kernel", name)
    if entry is not None and looked.source is not None and looked.index is not None:
        from banger.kernel.published import pull_published_kernel

        report.stage("resolve_kernel", f"kernel {name}: {_chosen(looked.source, looked.index)}")
        try:
            return await pull_published_kernel(
                daemon.paths, looked.source, entry, reporter=report, force=force
            )
        except BangerError as e:
            problem, why = e, str(e)
    if find_catalog_kernel(name) is not None:
        if problem is not None:
            report.warn(f"no bundle of the kernel {name}, so its own source is used: {problem}")
            why = "its bundle could not be had"
        report.stage("resolve_kernel", f"fetching the kernel {name} from its own source: {why}")
        if force:
            return await pull_kernel(daemon.paths, name, reporter=report, force=True)
        return await ensure_kernel(daemon.paths, name, reporter=report)
    if (recipe := find_build_recipe(name)) is not None:
        if problem is not None:
            report.warn(f"no bundle of the kernel {name}, so it is built here: {problem}")
            why = "its bundle could not be had"
        report.stage("resolve_kernel", f"building the kernel {name}, which takes minutes: {why}")
        return await build_kernel(
            daemon.paths,
            plan_build(name, recipe),
            reporter=report,
            force=force,
            reserve_bytes=daemon.settings.disk_reserve_bytes,
        )
    if problem is not None:
        raise problem
    known = [
        *(k.name for k in CATALOG),
        *(k.name for k in list_build_recipes()),
        *looked.names("kernel"),
    ]
    raise _unknown("kernel", name, known, hint="banger kernel list --available")


async def image_pull(daemon: Daemon, call: Call, params: p.PullImage) -> ImageRecord:
    """`image.pull`: a name of the catalog goes first, everything else is a reference."""
    name = params.reference
    if is_explicit(name):
        return await container_images.image_pull(daemon, call, params)
    if name not in list_recipes():
        looked = await look(daemon, call)
        if looked.problem is not None:
            # Not from a registry: who can spoil the index would choose another image for the name.
            raise looked.problem
        if looked.find("image", name) is None:
            return await container_images.image_pull(daemon, call, params)
    if params.kernel_ref is not None or params.install_sshd:
        what = "names its kernel" if params.kernel_ref is not None else "brings its sshd"
        raise BangerError(
            "bad_request",
            f"pulling {name}: an image of the catalog {what} itself",
            hint=f"banger image pull {name}",
        )
    target = params.name or name
    if (existing := find_image(daemon.paths, target)) is not None:
        if not params.force:
            if params.name is not None:
                raise BangerError(
                    "already_exists",
                    f"there is an image {target} already",
                    hint=f"banger image delete {target}",
                )
            call.stage("resolve_image", f"image {name}: it is here already")
            return existing
        container_images.refuse_in_use(daemon, existing)
    return await obtain_image(daemon, name, call, as_name=params.name, replaced=existing)


async def kernel_pull(daemon: Daemon, call: Call, params: p.PullKernel) -> KernelRecord:
    """`kernel.pull`: refused without `force` when the entry is here."""
    refuse_existing(daemon.paths, params.name, force=params.force)
    return await obtain_kernel(daemon, params.name, call, force=params.force)


async def kernel_catalog(daemon: Daemon, call: Call, _: p.Empty) -> c.KernelCatalog:
    """`kernel.catalog`: what is here and what could be pulled."""
    looked = await look(daemon, Silent())
    rows = {}
    for known in CATALOG:
        rows[known.name] = c.AvailableKernel(
            name=known.name, distro=known.distro, arch=known.arch, pulled=False, version=None,
            size_bytes=None, source=f"apt: {known.suite}", description=known.description,
        )  # fmt: skip
    for recipe in list_build_recipes():
        rows[recipe.name] = c.AvailableKernel(
            name=recipe.name, distro=recipe.distro, arch=recipe.arch, pulled=False, version=None,
            size_bytes=None, source=f"built from apt: {recipe.package}",
            description=recipe.description,
        )  # fmt: skip
    for entry in looked.index.entries if looked.index and looked.source else ():
        if entry.kind == "kernel":
            rows[entry.name] = c.AvailableKernel(
                name=entry.name, distro=entry.distro, arch=entry.arch, pulled=False,
                version=entry.kernel_version, size_bytes=entry.size_bytes,
                source=f"bundle: {looked.source.host if looked.source else ''}",
                description=entry.description,
            )  # fmt: skip
    for kernel in list_kernels(daemon.paths):
        offered = rows.get(kernel.name)
        rows[kernel.name] = c.AvailableKernel(
            name=kernel.name, distro=kernel.distro, arch=kernel.arch, pulled=True,
            version=kernel.kernel_version,
            size_bytes=offered.size_bytes if offered else None,
            source=kernel.source,
            description=offered.description if offered else f"Linux {kernel.release}",
        )  # fmt: skip
    return c.KernelCatalog(
        kernels=tuple(rows[name] for name in sorted(rows)),
        problem=str(looked.problem) if looked.problem else None,
    )


def _chosen(source: Published, index: Index) -> str:
    return f"its bundle from {source.host}, index version {index.version}"


def _unknown(kind: Kind, name: str, known: list[str], *, hint: str) -> BangerError:
    near = difflib.get_close_matches(name, known, n=1)
    extra = f"; did you mean {near[0]!r}?" if near else ""
    return BangerError("not_found", f"there is no {kind} {name!r}{extra}", hint=hint)
