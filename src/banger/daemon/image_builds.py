"""Images built in a machine: one of the base is booted, furnished, read as a whole, thrown away.

A build belongs to its call: when that ends, by success, failure, cancellation or the client's
going, the machine and everything temporary is gone; what a killed daemon leaves is removed by the
next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from banger import files
from banger.api import params as p
from banger.config.settings import default_sizing, host_memory_mib
from banger.daemon import container_images, ships
from banger.disk.background import run_job
from banger.errors import BangerError
from banger.image.capture import NewImage, capture_image
from banger.image.entries import delete_image, list_images
from banger.image.features import assemble, needs_packages
from banger.image.furnish import find_manager, furnish
from banger.image.pull import find_pulled, pull_image
from banger.names import is_temporary_image, temporary_image_name
from banger.rpc.server import Call
from banger.vm.create import check_create, create
from banger.vm.stop import delete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from banger.api.records import ImageRecord, VmRecord
    from banger.daemon.daemon import Daemon
    from banger.disk.background import Job
    from banger.image.features import Extras
    from banger.image.recipe import LoadedRecipe
    from banger.progress import Reporter
    from banger.rpc.trees import GuestFiles

T = TypeVar("T")


_DOWNLOADS = "downloads-for-a-build"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a build takes; None is the default of new VMs."""

    nat: bool = False
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_bytes: int | None = None
    overlay_bytes: int | None = None


async def build_in_machine(
    daemon: Daemon,
    report: Reporter,
    loaded: LoadedRecipe,
    extras: Extras,
    *,
    name: str,
    archive: str | None = None,
    kernel_ref: str | None = None,
    machine: Machine | None = None,
    named: bool = True,
    replaced: ImageRecord | None = None,
) -> ImageRecord:
    """The image of a recipe whose root is another image's, stored as `name`.

    `named`: the recipe has a name of its own, which the image remembers. `replaced` is an image
    that may go, which it does when the new one is whole.

    Raises:
        BangerError: whatever stage failed; nothing is left of it.
    """
    machine = machine or Machine()
    _check_archive(loaded, archive)
    nat = machine.nat or needs_packages(loaded, extras)
    async with _base(daemon, report, loaded, archive) as base:
        asked = _machine_of(daemon, base, machine, nat=nat)
        check_create(asked)
        report.stage("machine", f"starting a machine of {base.name}")
        vm = await create(daemon.vms, asked, base, report, building=True)
        try:
            whole, missing = await _furnish(daemon, vm, loaded, extras, report)
            new = NewImage(
                name=name,
                base=base,
                distro=base.distro if not named else loaded.recipe.distro,
                kernel_ref=kernel_ref or loaded.recipe.kernel_ref or base.kernel_ref,
                features=whole.recipe.features,
                recipe=loaded.recipe.name if named else None,
                optional_missing=missing,
                description=loaded.recipe.description or f"made of {loaded.recipe.source}",
                disk_bytes=vm.overlay_bytes + vm.work_disk_bytes,
                replaced=replaced,
                reserve_bytes=daemon.settings.disk_reserve_bytes,
            )
            return await _in_guest(
                daemon,
                vm,
                report,
                lambda guest, job: capture_image(
                    daemon.paths,
                    guest,
                    new,
                    job,
                    refuse=partial(container_images.refuse_in_use, daemon),
                ),
            )
        finally:
            with contextlib.suppress(BangerError):  # somebody else has deleted it
                await daemon.vms.finish_alone(
                    delete(daemon.vms, vm, kill_it=True), f"delete {vm.name}"
                )


def remove_abandoned_bases(daemon: Daemon) -> None:
    """Delete what builds that ended with a daemon have left; for a daemon's start."""
    for path in daemon.paths.images.glob(f".{_DOWNLOADS}-*"):
        files.remove_tree(path)
    used = {vm.image_id for vm in daemon.store.list()}
    for image in list_images(daemon.paths):
        if is_temporary_image(image.name) and image.id not in used:
            delete_image(daemon.paths, image.id)


async def _furnish(
    daemon: Daemon, vm: VmRecord, loaded: LoadedRecipe, extras: Extras, report: Reporter
) -> tuple[LoadedRecipe, tuple[str, ...]]:
    show: Callable[[str], None] = report.line_sender() if isinstance(report, Call) else _nobody

    def work(guest: GuestFiles, job: Job) -> tuple[LoadedRecipe, tuple[str, ...]]:
        whole = assemble(loaded, extras, find_manager(guest))
        with files.staging_directory(daemon.paths.images, _DOWNLOADS) as downloads:
            return whole, furnish(guest, whole, downloads=downloads, show=show, job=job)

    return await _in_guest(daemon, vm, report, work)


async def _in_guest(
    daemon: Daemon, vm: VmRecord, report: Reporter, work: Callable[[GuestFiles, Job], T]
) -> T:
    """Blocking work with a guest in a thread, until it, the call or the machine ends."""
    guest = ships.guest_files(daemon, vm)

    def run(job: Job) -> T:
        with job.interrupting(guest.cancel):
            return work(guest, job)

    return await daemon.vms.while_running(vm, run_job(run, report))


@contextlib.asynccontextmanager
async def _base(
    daemon: Daemon, report: Reporter, loaded: LoadedRecipe, archive: str | None
) -> AsyncIterator[ImageRecord]:
    """The image that the build begins with. One that was pulled for it goes away with it."""
    # A recipe may lead to another recipe, and so this module to those that it is used by.
    from banger.daemon import stored

    kind, _, rest = loaded.recipe.source.partition(":")
    if archive is None and kind == "image":
        yield await stored.ensure_image(daemon, rest, report)
        return
    reference = rest if archive is None else f"archive:{archive}"
    asked = p.PullImage(
        reference=reference, name=temporary_image_name(), kernel_ref=loaded.recipe.kernel_ref
    )
    plan = container_images.plan(daemon, asked)
    if archive is None and (found := find_pulled(daemon.paths, plan)) is not None:
        await stored.ensure_kernel(daemon, found, report)
        yield found
        return
    report.stage("resolve_image", f"fetching {plan.reference} for {loaded.recipe.name}")
    try:
        pulled = await pull_image(daemon.paths, plan, reporter=report)
    except BangerError as e:
        if archive is None and e.reason != "disk_full":
            e.hint = (
                f"banger image build --name {loaded.recipe.name} --recipe {loaded.recipe.name} "
                "--archive FILE"
            )
        raise
    try:
        await stored.ensure_kernel(daemon, pulled, report)
        yield pulled
    finally:
        await asyncio.to_thread(delete_image, daemon.paths, pulled.id)


def _check_archive(loaded: LoadedRecipe, archive: str | None) -> None:
    recipe = loaded.recipe
    problem = None
    if archive is None and recipe.source == "archive":
        problem = "it takes its root from an archive: --archive FILE"
    elif archive is not None and not (recipe.source == "archive" or recipe.source[:4] == "oci:"):
        problem = f"its root is {recipe.source}, an archive has no place in it"
    elif archive is not None and not Path(archive).is_absolute():
        problem = f"the path {archive!r} must be absolute"
    if problem is not None:
        raise BangerError(
            "bad_request", f"building {recipe.name}: {problem}", hint="banger image build --help"
        )


def _machine_of(daemon: Daemon, base: ImageRecord, machine: Machine, *, nat: bool) -> p.CreateVm:
    size = default_sizing(
        daemon.settings.vm_defaults,
        host_cpus=os.cpu_count() or 1,
        host_memory_mib=host_memory_mib(),
    )
    return p.CreateVm(
        image=base.name,
        vcpu=size.vcpu if machine.vcpu is None else machine.vcpu,
        memory_mib=size.memory_mib if machine.memory_mib is None else machine.memory_mib,
        disk_bytes=size.disk_bytes if machine.disk_bytes is None else machine.disk_bytes,
        overlay_bytes=(
            size.overlay_bytes if machine.overlay_bytes is None else machine.overlay_bytes
        ),
        name=f"build-{secrets.token_hex(4)}",
        nat=nat,
    )


def _nobody(line: str) -> None:
    """Who waits for an image on the way to something else does not read along."""
