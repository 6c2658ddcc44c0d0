"""What a guest kernel must have, checked against its `.config` before it becomes an entry.

Without PCI and ACPI the serial console and the virtio devices lose their interrupts, and the guest
looks dead; the rest is what the agent mounts and what Docker inside a guest needs.
"""

from __future__ import annotations

import re

_BUILT_IN = (
    "PCI", "ACPI", "BLK_DEV_INITRD", "DEVTMPFS", "TMPFS", "UNIX", "INET", "SERIAL_8250_CONSOLE",
    "SQUASHFS_LZ4", "SQUASHFS_XATTR", "CGROUPS", "NAMESPACES", "NETFILTER", "PACKET",
)  # fmt: skip
_BUILT_IN_OR_MODULE = (
    "VIRTIO_MMIO", "VIRTIO_BLK", "VIRTIO_NET", "VSOCKETS", "VIRTIO_VSOCKETS", "OVERLAY_FS",
    "SQUASHFS", "EXT4_FS", "BRIDGE", "VETH", "NF_TABLES",
)  # fmt: skip

# Loaded by the agent before there is a root filesystem; what they depend on comes with them.
BOOT_MODULES = (
    "failover", "net_failover", "virtio_mmio", "virtio_blk", "virtio_net", "vsock",
    "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "overlay", "squashfs",
    "ext4",
)  # fmt: skip


def find_missing_options(config: str) -> tuple[str, ...]:
    """The options that a kernel `.config` lacks, as `CONFIG_X=y` or `CONFIG_X=y|m`."""
    values = dict(re.findall(r"^CONFIG_(\w+)=([ym])$", config, re.MULTILINE))
    missing = [f"CONFIG_{o}=y" for o in _BUILT_IN if values.get(o) != "y"]
    missing += [f"CONFIG_{o}=y|m" for o in _BUILT_IN_OR_MODULE if o not in values]
    return tuple(missing)


def find_missing_boot_options(config: str) -> tuple[str, ...]:
    """What a kernel without modules lacks: there, what boots a guest is built in."""
    values = dict(re.findall(r"^CONFIG_(\w+)=([ym])$", config, re.MULTILINE))
    return tuple(f"CONFIG_{o}=y" for o in _BUILT_IN_OR_MODULE if values.get(o) == "m")
