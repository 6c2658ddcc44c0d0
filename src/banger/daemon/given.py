"""Images and kernels out of the user's own files, and back into files: register, import, export."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from banger.daemon import catalog
from banger.disk.background import run_job
from banger.errors import BangerError
from banger.image.entries import list_images
from banger.image.published import export_image
from banger.image.register import check_rootfs, promote_image, refuse_existing, register_image
from banger.kernel.build import build_kernel, plan_build
from banger.kernel.build_recipe import get_build_recipe
from banger.kernel.entries import delete_kernel, find_kernel
from banger.kernel.fragment import parse_fragment
from banger.kernel.given import GivenKernel, make_kernel, plan_import
from banger.kernel.known import is_known_kernel
from banger.kernel.published import export_kernel
from banger.kernel.sources import plan_tarball
from banger.names import check_entry_name
from banger.progress import Silent

if TYPE_CHECKING:
    from banger.api import catalog as c
    from banger.api import params as p
    from banger.api.records import ImageRecord, KernelRecord
    from banger.daemon.daemon import Daemon
    from banger.rpc.server import Call

log = logging.getLogger(__name__)

_HINT = "banger image register --help"


async def image_register(daemon: Daemon, call: Call, params: c.RegisterImage) -> ImageRecord:
    """`image.register`: the root filesystem is used in place, a kernel becomes an entry."""
    _check(params)
    rootfs = Path(params.rootfs)
    check_entry_name(params.name, "image")
    check_rootfs(rootfs)
    refuse_existing(daemon.paths, params.name)
    kernel_ref = params.kernel_ref
    if kernel_ref is None:
        kernel_ref = (await _make_kernel(daemon, call, params)).name
    else:
        await refuse_unknown_kernel(daemon, call, kernel_ref)
    try:
        return await register_image(
            daemon.paths,
            name=params.name,
            rootfs=rootfs,
            kernel_ref=kernel_ref,
            distro=params.distro,
            reporter=call,
        )
    except BaseException:
        if params.kernel_ref is None:
            await asyncio.to_thread(delete_kernel, daemon.paths, kernel_ref)
        raise


def _check(params: c.RegisterImage) -> None:
    files = (params.kernel, params.initrd, params.modules)
    problem = None
    if params.kernel_ref is not None and any(files):
        problem = "a kernel's name excludes files of one"
    elif params.kernel_ref is None and params.kernel is None:
        problem = "it takes a kernel: the name of an entry, or a file"
    elif params.initrd is not None and params.modules is not None:
        problem = "an initrd and a directory of modules exclude each other"
    elif bad := [path for path in files if path is not None and not path.startswith("/")]:
        problem = f"the path {bad[0]} must be absolute"
    if problem:
        raise BangerError("bad_request", f"registering {params.name}: {problem}", hint=_HINT)


async def _make_kernel(daemon: Daemon, call: Call, params: c.RegisterImage) -> KernelRecord:
    assert params.kernel is not None
    return await make_kernel(
        daemon.paths,
        GivenKernel(
            name=f"{params.name}-kernel",
            distro=params.distro,
            source=_owner(params.name),
            root=None,
            kernel=Path(params.kernel),
            initrd=Path(params.initrd) if params.initrd else None,
            modules=Path(params.modules) if params.modules else None,
        ),
        force=False,
        reserve_bytes=daemon.settings.disk_reserve_bytes,
        reporter=call,
    )


async def refuse_unknown_kernel(daemon: Daemon, call: Call, kernel: str) -> None:
    """Raises BangerError, not_found, for a kernel that is neither here nor in the catalog."""
    if find_kernel(daemon.paths, kernel) is not None or is_known_kernel(kernel):
        return
    looked = await catalog.look(daemon, call)
    if looked.problem is not None:
        raise looked.problem
    if looked.find("kernel", kernel) is None:
        raise BangerError(
            "not_found",
            f"there is no kernel {kernel!r}, here or in the catalog",
            hint="banger kernel list --available",
        )


async def forget_kernel_of(daemon: Daemon, image: ImageRecord) -> None:
    """Remove the kernel entry that was made for a registered image, which is gone.

    One that others boot with stays.
    """
    kernel = find_kernel(daemon.paths, image.kernel_ref)
    if kernel is None or kernel.source != _owner(image.name):
        return
    refuse = partial(refuse_kernel_in_use, daemon)
    try:
        await run_job(
            lambda job: delete_kernel(daemon.paths, kernel.name, job=job, refuse=refuse), Silent()
        )
    except BangerError as e:
        if e.reason != "in_use":
            raise
        log.info("%s; it stays when the image %s goes", e, image.name)


def refuse_kernel_in_use(daemon: Daemon, kernel: KernelRecord) -> None:
    """Raises BangerError, reason in_use, when an image or a VM boots with this kernel."""
    users = [i.name for i in list_images(daemon.paths) if i.kernel_ref == kernel.name]
    users += [vm.name for vm in daemon.store.list() if vm.kernel == kernel.name]
    if users:
        raise BangerError(
            "operation_failed",
            f"kernel {kernel.name} is used by {', '.join(sorted(set(users)))}",
            hint="banger image list",
            reason="in_use",
        )


def _owner(image: str) -> str:
    """The source of a kernel entry that belongs to an image."""
    return f"image:{image}"


async def image_promote(daemon: Daemon, call: Call, params: p.NameRef) -> ImageRecord:
    """`image.promote`: a registered image becomes banger's own; VMs that use it go on."""
    return await promote_image(
        daemon.paths,
        params.name,
        reporter=call,
        reserve_bytes=daemon.settings.disk_reserve_bytes,
    )


async def kernel_import(daemon: Daemon, call: Call, params: c.ImportKernel) -> KernelRecord:
    """`kernel.import`: an entry from a directory of the user's."""
    if params.arch != "amd64":
        raise BangerError(
            "bad_request",
            f"importing {params.name}: microVMs on this host are amd64, nothing else",
            hint="banger kernel import --help",
        )
    given = await asyncio.to_thread(plan_import, params.name, Path(params.directory), params.distro)
    return await make_kernel(
        daemon.paths,
        given,
        force=params.force,
        reserve_bytes=daemon.settings.disk_reserve_bytes,
        reporter=call,
    )


async def kernel_build(daemon: Daemon, call: Call, params: c.BuildKernel) -> KernelRecord:
    """`kernel.build`: an entry compiled from a recipe's sources."""
    if params.signature is not None and params.source is None:
        raise BangerError(
            "bad_request",
            "a signature is that of a tarball: it takes both files",
            hint="banger kernel build --help",
        )
    added = parse_fragment(params.fragment or "", what="the configuration fragment")
    key = params.signing_key
    build = plan_build(
        params.name or params.recipe,
        get_build_recipe(params.recipe),
        added=added,
        jobs=params.jobs,
        tarball=plan_tarball(
            Path(params.source), Path(params.signature) if params.signature else None
        )
        if params.source
        else None,
        signing_key=key.encode() if key is not None else None,
    )
    return await build_kernel(
        daemon.paths,
        build,
        force=params.force,
        reserve_bytes=daemon.settings.disk_reserve_bytes,
        reporter=call,
    )


async def image_export(daemon: Daemon, call: Call, params: p.NameRef) -> c.Exported:
    """`image.export`: the data frames are the bundle."""
    return await export_image(daemon.paths, params.name, write=call.data_sender(), reporter=call)


async def kernel_export(daemon: Daemon, call: Call, params: p.NameRef) -> c.Exported:
    """`kernel.export`: the data frames are the bundle."""
    return await export_kernel(daemon.paths, params.name, write=call.data_sender(), reporter=call)
