"""Sizes on the command line: flags, their defaults, and the line that says what will be created."""

from __future__ import annotations

import functools
import os
from typing import Any

import click

from banger.config.settings import (
    Settings,
    Sizing,
    VmDefaults,
    default_sizing,
    host_memory_mib,
    read_settings,
)
from banger.errors import BangerError
from banger.units import MIB, format_size, parse_size


class Size(click.ParamType[int]):
    """A size such as 512M or 4G, in bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Duration(click.ParamType[float]):
    """A duration such as 10s or 5m, in seconds."""

    name = "DURATION"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from banger.units import parse_duration

        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


@functools.cache
def settings() -> Settings:
    from banger.config.target import choose_paths

    return read_settings(*choose_paths().config_files)


@functools.cache
def defaults() -> Sizing:
    return default_sizing(
        settings().vm_defaults, host_cpus=os.cpu_count() or 1, host_memory_mib=host_memory_mib()
    )


def sizing_options(command: Any) -> Any:
    """--vcpu, --memory, --disk-size and --system-overlay-size, with the defaults in the help."""
    try:
        size = defaults()
    except BangerError:
        # Help is there also when the configuration is not; whoever asks for more hears why.
        size = default_sizing(
            VmDefaults(), host_cpus=os.cpu_count() or 1, host_memory_mib=host_memory_mib()
        )
    for option in (
        click.option(
            "--system-overlay-size",
            type=Size(),
            help=f"Room for system changes [{format_size(size.overlay_bytes)}].",
        ),
        click.option(
            "--disk-size", type=Size(), help=f"Room in /root [{format_size(size.disk_bytes)}]."
        ),
        click.option("--memory", type=Size(), help=f"Memory [{size.memory_mib}M]."),
        click.option("--vcpu", type=int, help=f"Virtual CPUs [{size.vcpu}]."),
    ):
        command = option(command)
    return command


def resolve(
    vcpu: int | None, memory: int | None, disk_size: int | None, system_overlay_size: int | None
) -> Sizing:
    """What was asked for, else the defaults."""
    size = defaults()
    return Sizing(
        vcpu=size.vcpu if vcpu is None else vcpu,
        memory_mib=size.memory_mib if memory is None else memory // MIB,
        disk_bytes=size.disk_bytes if disk_size is None else disk_size,
        overlay_bytes=size.overlay_bytes if system_overlay_size is None else system_overlay_size,
    )


def spec_line(size: Sizing, image: str, *, nat: bool) -> str:
    """The first line on stderr: exactly what will be created (spec 1.2)."""
    return (
        f"spec: {size.vcpu} vCPU | {size.memory_mib} MiB | disk {format_size(size.disk_bytes)} | "
        f"image {image} | nat {'on' if nat else 'off'}"
    )
