"""Images and kernels as the daemon offers them: found, or made when they are known and absent."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from banger.api import params as p
from banger.api import results as r
from banger.daemon import catalog, confinement, container_images, given, image_builds
from banger.disk.background import run_job
from banger.errors import BangerError
from banger.image import build
from banger.image.entries import (
    find_image,
    get_image,
    list_images,
    verify_image,
)
from banger.image.features import bare_recipe, read_extras
from banger.image.recipe import load_recipe
from banger.kernel.entries import delete_kernel, find_kernel, get_kernel, list_kernels
from banger.names import check_entry_name
from banger.oci.reference import is_explicit

if TYPE_CHECKING:
    from banger.api.records import ImageRecord, KernelRecord
    from banger.daemon.daemon import Daemon
    from banger.image.features import Extras
    from banger.image.recipe import LoadedRecipe
    from banger.progress import Reporter
    from banger.rpc.server import Call


async def ensure_image(daemon: Daemon, name: str, report: Reporter) -> ImageRecord:
    """The image of this name with its kernel; both are made when absent and known.

    Raises:
        BangerError: not_found, with the nearest name.
    """
    if is_explicit(name):
        image: ImageRecord | None = await container_images.ensure_pulled(daemon, name, report)
    else:
        image = find_image(daemon.paths, name)
    if image is None:
        image = await catalog.obtain_image(daemon, name, report)
    await ensure_kernel(daemon, image, report)
    # Who reserves a VM of it does so before anything else happens; meanwhile it may have gone.
    return get_image(daemon.paths, image.id)


async def ensure_kernel(daemon: Daemon, image: ImageRecord, report: Reporter) -> None:
    """The kernel that an image boots with, made when it is absent and known. Raises as above."""
    if find_kernel(daemon.paths, image.kernel_ref) is None:
        await catalog.obtain_kernel(daemon, image.kernel_ref, report)


async def image_list(daemon: Daemon, call: Call, _: p.Empty) -> list[ImageRecord]:
    return list(list_images(daemon.paths))


async def image_show(daemon: Daemon, call: Call, params: p.NameRef) -> ImageRecord:
    return get_image(daemon.paths, params.name)


async def image_build(daemon: Daemon, call: Call, params: p.BuildImage) -> ImageRecord:
    """`image.build`: on the host from packages, or in a machine of another image."""
    check_entry_name(params.name, "image")
    if (params.recipe is None) == (params.from_image is None):
        raise BangerError(
            "bad_request",
            f"building {params.name}: either a recipe or an image to begin with",
            hint="banger image build --help",
        )
    extras = await asyncio.to_thread(
        read_extras, params.packages, params.features, tuple(map(Path, params.scripts))
    )
    if params.recipe is not None:
        loaded = load_recipe(params.recipe)
    else:
        base = await ensure_image(daemon, str(params.from_image), call)
        loaded = bare_recipe(params.name, base.name, base.distro)
    existing = find_image(daemon.paths, params.name)
    if existing is not None:
        if not params.force:
            raise BangerError(
                "already_exists",
                f"an image named {params.name!r} exists already",
                hint=f"banger image delete {params.name}",
            )
        container_images.refuse_in_use(daemon, existing)
    if params.kernel_ref is not None:
        await given.refuse_unknown_kernel(daemon, call, params.kernel_ref)
    if loaded.recipe.bootstrapped:
        return await _bootstrap(daemon, call, params, loaded, extras, existing)
    return await image_builds.build_in_machine(
        daemon,
        call,
        loaded,
        extras,
        name=params.name,
        archive=params.archive,
        kernel_ref=params.kernel_ref,
        machine=image_builds.Machine(
            nat=params.nat,
            vcpu=params.vcpu,
            memory_mib=params.memory_mib,
            disk_bytes=params.disk_bytes,
            overlay_bytes=params.overlay_bytes,
        ),
        named=params.recipe is not None,
        replaced=existing,
    )


async def _bootstrap(
    daemon: Daemon,
    call: Call,
    params: p.BuildImage,
    loaded: LoadedRecipe,
    extras: Extras,
    existing: ImageRecord | None,
) -> ImageRecord:
    if params.archive is not None:
        raise BangerError(
            "bad_request",
            f"building {params.name}: the recipe {loaded.recipe.name} is made of packages, an "
            "archive has no place in it",
            hint="banger image build --help",
        )
    await confinement.refuse_build(daemon.paths, loaded, params.name, extras)
    return await build.build_image(
        daemon.paths,
        loaded,
        name=params.name,
        reporter=call,
        extras=extras,
        kernel_ref=params.kernel_ref,
        replaced=existing,
        refuse=partial(container_images.refuse_in_use, daemon),
    )


async def image_delete(daemon: Daemon, call: Call, params: p.NameRef) -> r.Deleted:
    image = get_image(daemon.paths, params.name)
    container_images.refuse_in_use(daemon, image)
    image = await container_images.remove_image(daemon, image.id, call)
    await given.forget_kernel_of(daemon, image)
    return r.Deleted(name=image.name)


async def image_verify(daemon: Daemon, call: Call, params: p.NameRef) -> ImageRecord:
    image = get_image(daemon.paths, params.name)
    problems = await asyncio.to_thread(verify_image, daemon.paths, image.name)
    if problems:
        raise BangerError(
            "operation_failed",
            f"image {image.name} is not what was stored: {'; '.join(problems)}",
            hint=_mend(image),
            reason="files_changed",
        )
    return image


def _mend(image: ImageRecord) -> str:
    """The command after which a damaged image is what it should be."""
    if image.recipe is not None:
        return f"banger image build --force --name {image.name} --recipe {image.recipe}"
    if image.oci is not None and image.oci.reference:
        return f"banger image pull --force --name {image.name} {image.oci.reference}"
    return f"banger image delete {image.name}"


async def kernel_list(daemon: Daemon, call: Call, _: p.Empty) -> list[KernelRecord]:
    return list(list_kernels(daemon.paths))


async def kernel_show(daemon: Daemon, call: Call, params: p.NameRef) -> KernelRecord:
    return get_kernel(daemon.paths, params.name)


async def kernel_delete(daemon: Daemon, call: Call, params: p.NameRef) -> r.Deleted:
    kernel = find_kernel(daemon.paths, params.name)
    if kernel is None:
        raise BangerError(
            "not_found", f"there is no kernel {params.name!r} here", hint="banger kernel list"
        )
    refuse = partial(given.refuse_kernel_in_use, daemon)
    refuse(kernel)
    await run_job(
        lambda job: delete_kernel(daemon.paths, kernel.name, job=job, refuse=refuse), call
    )
    return r.Deleted(name=kernel.name)
