"""The configuration files: strict, read once when the daemon starts, never written.

A later file overrides an earlier one key by key: tables merge, a list replaces. Unknown keys are
errors that name the file, the key and the nearest valid key.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from banger.config.file_sync import FileSync, check_file_sync
from banger.decoding import MALFORMED, convert, decode_toml
from banger.errors import BangerError
from banger.minisign import BadSignature, parse_public_key
from banger.units import GIB, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

# Private (RFC 1918) and shared (RFC 6598) address space.
_PRIVATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")

LogLevel = Literal["debug", "info", "warn", "error"]

_PATH_KEYS = ("firecracker_bin", "jailer_bin", "jailer_chroot_base", "ssh_key_path")
# Read by what runs as root, which believes no file of the owner's.
_HOST_KEYS = ("jailer_chroot_base",)
_MOST_POOLED = 64
# Less would stop VMs between two commands.
_LEAST_STALE_S = 60
_MOST_HOST_PORTS = 32
_MOST_INDEX_KEYS = 2


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
    jailer_bin: str | None = None
    jailer_enabled: bool = True
    jailer_chroot_base: str | None = None
    ssh_key_path: str | None = None
    default_image_name: str = "debian-bookworm"
    default_kernel_ref: str = "debian-6.12-cloud"
    oci_default_registry: str = "docker.io"
    oci_cache_limit: str = "10G"
    index_url: str = ""
    index_keys: tuple[str, ...] = ()
    auto_stop_stale_after: str = "0"
    stats_poll_interval: str = "10s"
    bridge_name: str = "br-fc"
    bridge_ip: str = "172.16.0.1"
    cidr: int = 24
    tap_pool_size: int = 4
    default_dns: tuple[str, ...] = ("1.1.1.1",)
    dns_listen_addr: str = "127.0.0.1:42069"
    guest_host_ports: tuple[int, ...] = ()
    vm_isolation: bool = True
    memory_budget_percent: int = 80
    disk_reserve: str = "2G"
    ready_timeout: str = "90s"
    stop_timeout: str = "10s"
    acp_command: tuple[str, ...] = ("opencode", "acp")
    vm_defaults: VmDefaults = VmDefaults()
    file_sync: tuple[FileSync, ...] = ()

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
        if self.tap_pool_size > _MOST_POOLED:
            raise ValueError(f"tap_pool_size must be {_MOST_POOLED} or less")
        _check_loopback(self.dns_listen_addr)
        if len(self.guest_host_ports) > _MOST_HOST_PORTS:
            raise ValueError(f"guest_host_ports takes {_MOST_HOST_PORTS} ports at most")
        if not all(1 <= port <= 65535 for port in self.guest_host_ports):
            raise ValueError("guest_host_ports must be 1 to 65535")
        for key in _PATH_KEYS:
            value: str | None = getattr(self, key)
            if value is not None and not value.startswith(("/", "~/")):
                raise ValueError(f"{key} must be an absolute path or begin with ~/")
        if not 10 <= self.memory_budget_percent <= 95:
            raise ValueError("memory_budget_percent must be 10 to 95")
        _check_index(self.index_url, self.index_keys)
        parse_size(self.disk_reserve)
        parse_size(self.oci_cache_limit)
        parse_duration(self.ready_timeout)
        parse_duration(self.stop_timeout)
        if 0 < parse_duration(self.auto_stop_stale_after) < _LEAST_STALE_S:
            raise ValueError(f"auto_stop_stale_after must be 0 or at least {_LEAST_STALE_S} s")
        if parse_duration(self.stats_poll_interval) < 1:
            raise ValueError("stats_poll_interval must be at least 1s")

    @property
    def disk_reserve_bytes(self) -> int:
        return parse_size(self.disk_reserve)

    @property
    def auto_stop_stale_after_s(self) -> float:
        """0: VMs are never stopped for want of use."""
        return parse_duration(self.auto_stop_stale_after)

    @property
    def stats_poll_interval_s(self) -> float:
        return parse_duration(self.stats_poll_interval)

    @property
    def oci_cache_limit_bytes(self) -> int:
        return parse_size(self.oci_cache_limit)

    @property
    def ready_timeout_s(self) -> float:
        return parse_duration(self.ready_timeout)

    @property
    def stop_timeout_s(self) -> float:
        return parse_duration(self.stop_timeout)

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"{self.bridge_ip}/{self.cidr}", strict=False)


def read_settings(*files: Path, home: Path | None = None) -> Settings:
    """The settings of these files, a later one over an earlier one; a missing file says nothing.

    The last is the owner's, whose `home` is what `~/` stands for (default: our own).

    Raises:
        BangerError: bad_request, naming file, key, value and what is allowed.
    """
    merged: dict[str, Any] = {}
    settings = Settings()
    for path in files:
        layer = _read_layer(path)
        doing = f"reading the configuration {path}"
        for key in _HOST_KEYS:
            if key in layer and len(files) > 1 and path == files[-1]:
                raise BangerError(
                    "bad_request",
                    f"{doing}: {key} can be set for the whole host only, in {files[0]}",
                    hint=f"$EDITOR {path}",
                )
        try:
            check_file_sync(layer.get("file_sync", []), home or Path.home())
        except ValueError as e:
            raise BangerError("bad_request", f"{doing}: {e}", hint=f"$EDITOR {path}") from e
        merged = merge_layers(merged, layer)
        # After each file, so that a value that does not fit is put down to the file that has it.
        try:
            settings = convert(merged, type=Settings)
        except msgspec.ValidationError as e:
            problem = f"{doing}: {e}{_found(str(e), merged)}{_nearest(str(e))}"
            raise BangerError("bad_request", problem, hint=f"$EDITOR {path}") from e
    return _expand(settings, home)


def merge_layers(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Two documents as one: `upper` wins key by key, tables merge, everything else replaces."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge_layers(below, value)
        else:
            merged[key] = value
    return merged


def _read_layer(path: Path) -> dict[str, Any]:
    doing = f"reading the configuration {path}"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise BangerError("bad_request", f"{doing}: {e.strerror}", hint=f"ls -l {path}") from e
    try:
        layer = decode_toml(text, type=dict[str, Any])
    except MALFORMED as e:
        raise BangerError("bad_request", f"{doing}: {e}", hint=f"$EDITOR {path}") from e
    # Two keys that may also be written in their simple form (spec 2.2).
    if isinstance(cidr := layer.get("cidr"), str) and cidr.isascii() and cidr.isdigit():
        layer["cidr"] = int(cidr)
    if isinstance(layer.get("default_dns"), str):
        layer["default_dns"] = [layer["default_dns"]]
    return layer


def _expand(settings: Settings, home: Path | None) -> Settings:
    paths = {
        key: str((home or Path.home()) / value[2:])
        for key in _PATH_KEYS
        if (value := getattr(settings, key)) is not None and value.startswith("~/")
    }
    return msgspec.structs.replace(settings, **paths) if paths else settings


def _check_loopback(text: str) -> None:
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        good = address.is_loopback and port.isascii() and int(port) < 65536
    except ValueError:
        good = False
    if not good:
        raise ValueError("dns_listen_addr must be a loopback address and a port: 127.0.0.1:42069")


def _check_index(url: str, keys: tuple[str, ...]) -> None:
    if url and not re.fullmatch(r"https?://[^/\s@]+/[^\s?#]+", url):
        raise ValueError("index_url must be the http or https address of an index.json")
    if len(keys) > _MOST_INDEX_KEYS:
        raise ValueError(f"index_keys takes {_MOST_INDEX_KEYS} keys at most")
    for key in keys:
        try:
            parse_public_key(key)
        except BadSignature as e:
            raise ValueError(f"index_keys: {e}") from e
    if url and not keys:
        raise ValueError("index_url needs index_keys, the minisign public keys that sign the index")


def _found(problem: str, document: Mapping[str, Any]) -> str:
    """The value that a problem is about, where its text names a key."""
    known = [*Settings.__struct_fields__, *VmDefaults.__struct_fields__]
    for word in re.findall(r"[a-z_]+", problem):
        if word in known and word != "vm_defaults":
            for table in (document, document.get("vm_defaults")):
                if isinstance(table, dict) and word in table:
                    return f" (it is {table[word]!r})"
    return ""


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
