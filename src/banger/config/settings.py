"""The configuration file: strict, read once when the daemon starts, never written.

Unknown keys are errors that name the file, the key and the nearest valid key.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import Literal

import msgspec

from banger.errors import BangerError
from banger.units import GIB, parse_duration, parse_size

# Private (RFC 1918) and shared (RFC 6598) address space.
_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")

LogLevel = Literal["debug", "info", "warn", "error"]


class VmDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[vm_defaults]`: sizes of new VMs; what is None is decided by the host (spec 2.4)."""

    vcpu: int | None = None
    memory_mib: int | None = None
    disk_size: str | None = None
    system_overlay_size: str | None = None

    def __post_init__(self) -> None:
        if self.vcpu is not None and not 1 <= self.vcpu <= 32:
            raise ValueError("vcpu must be 1 to 32")
        if self.memory_mib is not None and self.memory_mib < 128:
            raise ValueError("memory_mib must be 128 or more")
        for size in (self.disk_size, self.system_overlay_size):
            if size is not None:
                parse_size(size)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every key of the configuration file with its default (spec 2.2)."""

    log_level: LogLevel = "info"
    vmm: Literal["auto", "firecracker", "qemu"] = "auto"
    firecracker_bin: str | None = None
    ssh_key_path: str | None = None
    default_image_name: str = "debian-bookworm"
    default_kernel_ref: str = "debian-6.12-cloud"
    bridge_name: str = "br-fc"
    bridge_ip: str = "172.16.0.1"
    cidr: int = 24
    default_dns: tuple[str, ...] = ("1.1.1.1",)
    vm_isolation: bool = True
    memory_budget_percent: int = 80
    disk_reserve: str = "2G"
    ready_timeout: str = "90s"
    stop_timeout: str = "10s"
    vm_defaults: VmDefaults = VmDefaults()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"br-fc(-[a-z0-9-]{1,9})?", self.bridge_name):
            raise ValueError(
                "bridge_name must be br-fc or begin with br-fc-, 15 characters at most"
            )
        if not 8 <= self.cidr <= 30:
            raise ValueError("cidr must be 8 to 30")
        if not any(self.subnet.subnet_of(ipaddress.IPv4Network(n)) for n in _PRIVATE):
            raise ValueError(f"bridge_ip and cidr must lie within one of {', '.join(_PRIVATE)}")
        if ipaddress.IPv4Address(self.bridge_ip) in (
            self.subnet.network_address,
            self.subnet.broadcast_address,
        ):
            raise ValueError("bridge_ip must be a host's address of its subnet")
        if not 1 <= len(self.default_dns) <= 3:
            raise ValueError("default_dns takes one to three addresses")
        for server in self.default_dns:
            ipaddress.ip_address(server)
        if not 10 <= self.memory_budget_percent <= 95:
            raise ValueError("memory_budget_percent must be 10 to 95")
        parse_size(self.disk_reserve)
        parse_duration(self.ready_timeout)
        parse_duration(self.stop_timeout)

    @property
    def disk_reserve_bytes(self) -> int:
        return parse_size(self.disk_reserve)

    @property
    def ready_timeout_s(self) -> float:
        return parse_duration(self.ready_timeout)

    @property
    def stop_timeout_s(self) -> float:
        return parse_duration(self.stop_timeout)

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"{self.bridge_ip}/{self.cidr}", strict=False)


def read_settings(path: Path) -> Settings:
    """The settings of a configuration file; the defaults where there is none.

    Raises:
        BangerError: bad_request, naming file, key and what is allowed.
    """
    doing = f"reading the configuration {path}"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Settings()
    except OSError as e:
        raise BangerError("bad_request", f"{doing}: {e.strerror}", hint=f"ls -l {path}") from e
    try:
        return msgspec.toml.decode(text, type=Settings)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        problem = f"{doing}: {e}{_nearest(str(e))}"
        raise BangerError("bad_request", problem, hint=f"$EDITOR {path}") from e


def _nearest(problem: str) -> str:
    m = re.search(r"unknown field `([^`]*)`", problem)
    if not m:
        return ""
    known = [*Settings.__struct_fields__, *VmDefaults.__struct_fields__]
    near = difflib.get_close_matches(m[1], known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of one VM, as they will be created."""

    vcpu: int
    memory_mib: int
    disk_bytes: int
    overlay_bytes: int


def default_sizing(defaults: VmDefaults, *, host_cpus: int, host_memory_mib: int) -> Sizing:
    """Sizes where the user names none: configuration, host heuristic, floor (spec 2.4)."""
    vcpu = defaults.vcpu or min(max(2, min(host_cpus // 4, 4)), host_cpus)
    # The floor is itself limited to half of the host's memory.
    floor = min(2048, host_memory_mib // 2)
    memory = defaults.memory_mib or max(floor, min(host_memory_mib // 8, 8192))
    return Sizing(
        vcpu=vcpu,
        memory_mib=memory,
        disk_bytes=parse_size(defaults.disk_size) if defaults.disk_size else 8 * GIB,
        overlay_bytes=parse_size(defaults.system_overlay_size)
        if defaults.system_overlay_size
        else 8 * GIB,
    )


def host_memory_mib() -> int:
    """MemTotal of this host in MiB (proc_meminfo(5))."""
    with Path("/proc/meminfo").open(encoding="ascii") as f:
        for line in f:
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) // 1024
    raise BangerError("operation_failed", "/proc/meminfo names no MemTotal")
