"""Images and kernels as the daemon offers them: found, or made when they are known and absent."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from banger.api import params as p
from banger.api import results as r
from banger.errors import BangerError
from banger.image import build
from banger.image.entries import (
    delete_image,
    find_image,
    get_image,
    list_images,
    verify_image,
)
from banger.image.recipe import list_recipes, load_recipe
from banger.kernel.entries import delete_kernel, find_kernel, get_kernel, list_kernels
from banger.kernel.pull import CATALOG, ensure_kernel, pull_kernel

if TYPE_CHECKING:
    from banger.api.records import ImageRecord, KernelRecord
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter
    from banger.rpc.server import Call


async def ensure_image(daemon: Daemon, name: str, report: Reporter) -> ImageRecord:
    """The image of this name with its kernel; both are made when absent and known.

    Raises:
        BangerError: not_found, with the nearest name.
    """
    image = find_image(daemon.paths, name)
    if image is None:
        recipes = list_recipes()
        if name not in recipes:
            known = [*recipes, *(i.name for i in list_images(daemon.paths))]
            near = difflib.get_close_matches(name, known, n=1)
            extra = f"; did you mean {near[0]!r}?" if near else ""
            raise BangerError(
                "not_found", f"there is no image {name!r}{extra}", hint="banger image list"
            )
        report.stage("resolve_image", f"building the image {name} from its recipe")
        # Not `build_image`: a peer that has just finished the same one is success here.
        image = await build.ensure_image(daemon.paths, name, reporter=report)
    if find_kernel(daemon.paths, image.kernel_ref) is None:
        report.stage("resolve_image", f"fetching the kernel {image.kernel_ref}")
        await ensure_kernel(daemon.paths, image.kernel_ref, reporter=report)
    return image


async def image_list(daemon: Daemon, call: Call, _: p.Empty) -> list[ImageRecord]:
    return list(list_images(daemon.paths))


async def image_show(daemon: Daemon, call: Call, params: p.NameRef) -> ImageRecord:
    return get_image(daemon.paths, params.name)


async def image_build(daemon: Daemon, call: Call, params: p.BuildImage) -> ImageRecord:
    recipe = load_recipe(params.recipe)
    if (existing := find_image(daemon.paths, params.name)) is not None:
        if not params.force:
            raise BangerError(
                "already_exists",
                f"an image named {params.name!r} exists already",
                hint=f"banger image delete {params.name}",
            )
        _refuse_in_use(daemon, existing)
        delete_image(daemon.paths, existing.name)
    return await build.build_image(daemon.paths, recipe, name=params.name, reporter=call)


def _refuse_in_use(daemon: Daemon, image: ImageRecord) -> None:
    users = [vm.name for vm in daemon.store.list() if vm.image_id == image.id]
    if users:
        raise BangerError(
            "operation_failed",
            f"image {image.name} is used by {', '.join(users)}",
            hint=f"banger vm delete {users[0]}",
            reason="in_use",
        )


async def image_delete(daemon: Daemon, call: Call, params: p.NameRef) -> r.Deleted:
    image = get_image(daemon.paths, params.name)
    _refuse_in_use(daemon, image)
    delete_image(daemon.paths, image.name)
    return r.Deleted(name=image.name)


async def image_verify(daemon: Daemon, call: Call, params: p.NameRef) -> ImageRecord:
    import asyncio

    image = get_image(daemon.paths, params.name)
    problems = await asyncio.to_thread(verify_image, daemon.paths, image.name)
    if problems:
        raise BangerError(
            "operation_failed",
            f"image {image.name} is not what was stored: {'; '.join(problems)}",
            hint=f"banger image build --force --name {image.name} --recipe {image.recipe}",
            reason="files_changed",
        )
    return image


async def kernel_list(daemon: Daemon, call: Call, _: p.Empty) -> list[KernelRecord]:
    return list(list_kernels(daemon.paths))


async def kernel_show(daemon: Daemon, call: Call, params: p.NameRef) -> KernelRecord:
    return get_kernel(daemon.paths, params.name)


async def kernel_pull(daemon: Daemon, call: Call, params: p.PullKernel) -> KernelRecord:
    return await pull_kernel(daemon.paths, params.name, reporter=call, force=params.force)


async def kernel_delete(daemon: Daemon, call: Call, params: p.NameRef) -> r.Deleted:
    kernel = get_kernel(daemon.paths, params.name)
    users = [image.name for image in list_images(daemon.paths) if image.kernel_ref == kernel.name]
    users += [vm.name for vm in daemon.store.list() if vm.kernel == kernel.name]
    if users:
        raise BangerError(
            "operation_failed",
            f"kernel {kernel.name} is used by {', '.join(sorted(set(users)))}",
            hint="banger image list",
            reason="in_use",
        )
    delete_kernel(daemon.paths, kernel.name)
    return r.Deleted(name=kernel.name)


async def kernel_catalog(daemon: Daemon, call: Call, _: p.Empty) -> list[str]:
    return sorted(entry.name for entry in CATALOG)
