"""Container images as the daemon offers them: pulled by reference, or because a VM asks for one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from banger.api import params as p
from banger.api import results as r
from banger.disk.background import run_job
from banger.errors import BangerError
from banger.image.cache import prune_cache
from banger.image.entries import delete_image, find_image
from banger.image.pull import PullPlan, find_pulled, plan_pull, pull_image
from banger.kernel.entries import find_kernel
from banger.kernel.known import is_known_kernel
from banger.oci.reference import FileReference

if TYPE_CHECKING:
    from banger.api.records import ImageRecord
    from banger.daemon.daemon import Daemon
    from banger.progress import Reporter
    from banger.rpc.server import Call


async def image_pull(daemon: Daemon, call: Call, params: p.PullImage) -> ImageRecord:
    """`image.pull`: the image of a reference, pulled unless it is here unchanged."""
    wanted = plan(daemon, params, again=params.force)
    if wanted.replace and (existing := find_image(daemon.paths, wanted.name)) is not None:
        refuse_in_use(daemon, existing)
    if find_kernel(daemon.paths, wanted.kernel_ref) is None and not is_known_kernel(
        wanted.kernel_ref
    ):
        raise BangerError(
            "not_found",
            f"there is no kernel {wanted.kernel_ref!r}, here or in the catalog",
            hint="banger kernel list --available",
        )
    return await pull_image(
        daemon.paths, wanted, reporter=call, refuse=partial(refuse_in_use, daemon)
    )


async def ensure_pulled(daemon: Daemon, reference: str, report: Reporter) -> ImageRecord:
    """The image of a reference that a VM is asked for, pulled when it is not here.

    What a tag means in its registry is not asked again; a file is looked at, because its maker
    expects what is in it now.

    Raises:
        BangerError: as `pull_image`.
    """
    wanted = plan(daemon, p.PullImage(reference=reference))
    found = find_pulled(daemon.paths, wanted)
    if found is not None:
        if not isinstance(wanted.reference, FileReference):
            return found
        free = not any(vm.image_id == found.id for vm in daemon.store.list())
        wanted = plan(daemon, p.PullImage(reference=reference, name=found.name, force=free))
    report.stage("resolve_image", f"pulling the image {wanted.reference}")
    return await pull_image(
        daemon.paths, wanted, reporter=report, refuse=partial(refuse_in_use, daemon)
    )


async def cache_prune(daemon: Daemon, call: Call, params: p.PruneCache) -> r.PrunedCache:
    """`image.cache.prune`: frees what pulls keep for the next pull."""
    limit_bytes = daemon.settings.oci_cache_limit_bytes
    return await prune_cache(daemon.paths, limit_bytes=limit_bytes, dry_run=params.dry_run)


def refuse_in_use(daemon: Daemon, image: ImageRecord) -> None:
    """Raises BangerError, reason in_use, when a VM has this image."""
    users = [vm.name for vm in daemon.store.list() if vm.image_id == image.id]
    if users:
        raise BangerError(
            "operation_failed",
            f"image {image.name} is used by {', '.join(users)}",
            hint=f"banger vm delete {users[0]}",
            reason="in_use",
        )


async def remove_image(daemon: Daemon, image_id: str, report: Reporter) -> ImageRecord:
    """Remove an image that no VM has when its turn comes; waiting for that holds nobody up.

    Raises:
        BangerError: not_found; reason in_use.
    """
    return await run_job(
        lambda job: delete_image(
            daemon.paths, image_id, job=job, refuse=partial(refuse_in_use, daemon)
        ),
        report,
    )


def plan(daemon: Daemon, params: p.PullImage, *, again: bool = False) -> PullPlan:
    """What a pull does, with the settings of this daemon. Raises BangerError, bad_request."""
    return plan_pull(
        params.reference,
        default_registry=daemon.settings.oci_default_registry,
        kernel_ref=params.kernel_ref or daemon.settings.default_kernel_ref,
        name=params.name,
        platform=params.platform,
        install_sshd=params.install_sshd,
        replace=params.force,
        again=again,
        reserve_bytes=daemon.settings.disk_reserve_bytes,
        cache_limit_bytes=daemon.settings.oci_cache_limit_bytes,
    )
