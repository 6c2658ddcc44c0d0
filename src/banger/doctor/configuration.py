"""Checks of the configuration: files, keys, and where each default of a new VM comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from banger.config.settings import default_sizing, host_memory_mib
from banger.doctor.check import Check, Finding, count, failed, passed, warned
from banger.doctor.world import settings_hash
from banger.errors import BangerError
from banger.units import format_size
from banger.vm.file_sync import plan_file_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.config.settings import VmDefaults
    from banger.doctor.world import World

# What a default of a new VM is at least, host permitting (spec 2.4).
_FLOOR_VCPU, _FLOOR_MEMORY_MIB = 2, 2048


def _look_config(world: World) -> Iterator[Finding]:
    configuration = world.configuration()
    if configuration.message is not None:
        at_fault = next(
            (p for p in world.config_files if str(p) in configuration.message),
            world.config_files[-1],
        )
        yield failed(configuration.message, command=f"$EDITOR {at_fault}")
        return
    present = [str(p) for p in world.config_files if p.exists()]
    where = f"read from {' and '.join(present)}" if present else "there is no configuration file"
    facts = world.daemon().facts
    if facts is not None and facts.settings_sha256 != settings_hash(configuration.settings):
        yield warned(
            f"the configuration ({where}) has changed since the daemon read it",
            command="sudo banger system restart"
            if world.paths.mode == "system"
            else "banger daemon stop",
        )
    elif present:
        yield passed(f"{where}; every key is known")
    else:
        yield passed(f"{where}: all defaults ({world.config_files[-1]})")


def _look_defaults(world: World) -> Iterator[Finding]:
    cpus, memory_mib = os.cpu_count() or 1, host_memory_mib()
    defaults = world.settings.vm_defaults
    sizing = default_sizing(defaults, host_cpus=cpus, host_memory_mib=memory_mib)
    source = find_sources(defaults, host_cpus=cpus, host_memory_mib=memory_mib)
    values = {
        "vcpu": str(sizing.vcpu),
        "memory_mib": str(sizing.memory_mib),
        "disk_size": format_size(sizing.disk_bytes),
        "system_overlay_size": format_size(sizing.overlay_bytes),
    }
    yield passed(
        f"a new VM has {values['vcpu']} vCPU, {values['memory_mib']} MiB, disk "
        f"{values['disk_size']}, overlay {values['system_overlay_size']}",
        *(f"{key} = {value} ({source[key]})" for key, value in values.items()),
        f"[vm_defaults] of {world.config_files[-1]} changes them",
    )


def _look_file_sync(world: World) -> Iterator[Finding]:
    entries = world.settings.file_sync
    if not entries:
        yield passed("no file of your home is sent to VMs")
        return
    record = world.record()
    home = Path(record.home) if record is not None else Path.home()
    look = f"$EDITOR {world.config_files[-1]}"
    try:
        plan = plan_file_sync(entries, home)
    except BangerError as e:
        yield failed(f"{e}; no VM can be made", command=e.hint or look)
        return
    if plan.warnings:
        yield warned("not everything is sent to VMs", *plan.warnings, command=look)
    else:
        files = sum(not member.directory for member in plan.members)
        yield passed(
            f"{count(len(entries), 'entry', 'entries')}: {count(files, 'file')}, "
            f"{format_size(plan.byte_count)}"
        )


def find_sources(defaults: VmDefaults, *, host_cpus: int, host_memory_mib: int) -> dict[str, str]:
    """Where each default comes from: `config`, `auto` (this host), `builtin` (spec 2.4)."""
    heuristics = {
        "vcpu": host_cpus // 4 >= _FLOOR_VCPU,
        "memory_mib": host_memory_mib // 8 >= _FLOOR_MEMORY_MIB,
        "disk_size": True,
        "system_overlay_size": False,
    }
    return {
        key: "config" if getattr(defaults, key) is not None else "auto" if auto else "builtin"
        for key, auto in heuristics.items()
    }


CHECKS = (
    Check(
        name="config",
        look=_look_config,
        meaning="the configuration files can be read and have known keys and values; whether the "
        "daemon has read them since they changed",
        mends="editing the file that the row names; `banger daemon stop`",
    ),
    Check(
        name="vm defaults",
        look=_look_defaults,
        meaning="the sizes of a new VM, each with its source: `config`, `auto` (this host) or "
        "`builtin`",
        mends="`[vm_defaults]`",
    ),
    Check(
        name="file_sync",
        look=_look_file_sync,
        meaning="whether what `[[file_sync]]` names is there and can be sent",
        mends="editing the entry, or making what it names",
    ),
)
