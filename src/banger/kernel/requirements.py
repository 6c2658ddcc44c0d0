"""What a guest kernel must have, checked against its `.config` before it becomes an entry.

Without PCI and ACPI the serial console and the virtio devices lose their interrupts, and the guest
looks dead; the rest is what the agent mounts, what a restored snapshot needs to know that it is
one, and what Docker inside a guest needs.
"""

from __future__ import annotations

import re

_BUILT_IN = (
    "PCI", "ACPI", "BLK_DEV_INITRD", "DEVTMPFS", "TMPFS", "UNIX", "INET", "SERIAL_8250_CONSOLE",
    "SQUASHFS_LZ4", "SQUASHFS_XATTR", "CGROUPS", "NAMESPACES", "NETFILTER", "PACKET",
    "PCI_MMCONFIG",
)  # fmt: skip
_BUILT_IN_OR_MODULE = (
    "VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_NET", "VSOCKETS", "VIRTIO_VSOCKETS", "OVERLAY_FS",
    "SQUASHFS", "EXT4_FS", "VMGENID", "BRIDGE", "VETH", "NF_TABLES",
)  # fmt: skip

# Beside bridge, veth and nftables, which every kernel for guests must have.
_CONTAINERS_BUILT_IN = (
    "MEMCG", "CGROUP_PIDS", "CGROUP_DEVICE", "CGROUP_FREEZER", "CGROUP_SCHED", "CFS_BANDWIDTH",
    "CPUSETS", "CGROUP_BPF", "UTS_NS", "IPC_NS", "USER_NS", "PID_NS", "NET_NS", "SECCOMP_FILTER",
    "KEYS", "POSIX_MQUEUE",
)  # fmt: skip
_CONTAINERS_BUILT_IN_OR_MODULE = (
    "BRIDGE_NETFILTER", "NF_CONNTRACK", "NF_NAT", "NFT_CT", "NFT_NAT", "NFT_MASQ", "NFT_COMPAT",
    "NETFILTER_XT_MATCH_ADDRTYPE", "NETFILTER_XT_MATCH_CONNTRACK",
    "NETFILTER_XT_TARGET_MASQUERADE", "NETFILTER_XT_NAT",
)  # fmt: skip

# Loaded by the agent before there is a root filesystem; what they depend on comes with them.
BOOT_MODULES = (
    "failover", "net_failover", "virtio_mmio", "virtio_blk", "virtio_net", "vsock",
    "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "overlay", "squashfs",
    "ext4",
)  # fmt: skip


def find_missing_options(config: str) -> tuple[str, ...]:
    """The options that a kernel `.config` lacks, as `CONFIG_X=y` or `CONFIG_X=y|m`."""
    return _missing(config, _BUILT_IN, _BUILT_IN_OR_MODULE)


def find_missing_boot_options(config: str) -> tuple[str, ...]:
    """What a kernel without modules lacks: there, what boots a guest is built in."""
    values = _values(config)
    return tuple(f"CONFIG_{o}=y" for o in _BUILT_IN_OR_MODULE if values.get(o) == "m")


def find_missing_container_options(config: str) -> tuple[str, ...]:
    """What Docker inside a guest would miss; a guest without it boots all the same."""
    return _missing(config, _CONTAINERS_BUILT_IN, _CONTAINERS_BUILT_IN_OR_MODULE)


def _missing(config: str, built_in: tuple[str, ...], either: tuple[str, ...]) -> tuple[str, ...]:
    values = _values(config)
    missing = [f"CONFIG_{o}=y" for o in built_in if values.get(o) != "y"]
    missing += [f"CONFIG_{o}=y|m" for o in either if o not in values]
    return tuple(missing)


def _values(config: str) -> dict[str, str]:
    return dict(re.findall(r"^CONFIG_(\w+)=([ym])$", config, re.MULTILINE))
