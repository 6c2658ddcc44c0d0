"""Module order, kernel requirements, and the base initrd they end up in."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.disk.cpio import read_members
from banger.errors import BangerError
from banger.kernel.base_initrd import (
    build_module_members,
    read_module_members,
    write_base_initrd,
    write_members,
)
from banger.kernel.modules import read_load_order
from banger.kernel.requirements import (
    BOOT_MODULES,
    find_missing_container_options,
    find_missing_options,
)

DEP = """\
kernel/net/core/failover.ko:
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/fs/squashfs/squash-fs.ko:
kernel/fs/unused.ko:
"""
GOOD_CONFIG = "\n".join(
    [
        f"CONFIG_{option}=y"
        for option in (
            "PCI ACPI BLK_DEV_INITRD DEVTMPFS TMPFS UNIX INET SERIAL_8250_CONSOLE SQUASHFS_LZ4 "
            "SQUASHFS_XATTR CGROUPS NAMESPACES NETFILTER PACKET EXT4_FS PCI_MMCONFIG"
        ).split()
    ]
    + [
        f"CONFIG_{option}=m"
        for option in (
            "VIRTIO_MMIO VIRTIO_BLK VIRTIO_NET VSOCKETS VIRTIO_VSOCKETS OVERLAY_FS SQUASHFS BRIDGE "
            "VETH NF_TABLES VMGENID"
        ).split()
    ]
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "modules.dep").write_text(DEP)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    return tmp_path


def test_each_module_comes_after_what_it_needs_and_once(tree: Path) -> None:
    assert read_load_order(tree, ["virtio_net", "failover"]) == (
        "kernel/net/core/failover.ko",
        "kernel/drivers/net/net_failover.ko",
        "kernel/drivers/net/virtio_net.ko",
    )


def test_what_is_built_in_is_left_out(tree: Path) -> None:
    assert read_load_order(tree, ["ext4"]) == ()


def test_hyphen_and_underscore_are_one(tree: Path) -> None:
    assert read_load_order(tree, ["squash_fs"]) == ("kernel/fs/squashfs/squash-fs.ko",)


def test_a_module_that_is_nowhere_is_an_error(tree: Path) -> None:
    with pytest.raises(BangerError, match="no module overlay"):
        read_load_order(tree, ["overlay"])


def test_every_boot_module_is_wanted_once() -> None:
    assert len(set(BOOT_MODULES)) == len(BOOT_MODULES)


def test_a_complete_config_lacks_nothing() -> None:
    assert find_missing_options(GOOD_CONFIG) == ()


@pytest.mark.parametrize(
    "option", ["PCI", "PCI_MMCONFIG", "ACPI", "SERIAL_8250_CONSOLE", "SQUASHFS_LZ4"]
)
def test_a_kernel_whose_console_or_image_would_be_dead_is_found_out(option: str) -> None:
    config = GOOD_CONFIG.replace(f"CONFIG_{option}=y", f"# CONFIG_{option} is not set")
    assert find_missing_options(config) == (f"CONFIG_{option}=y",)


def test_a_kernel_that_would_not_know_a_restored_snapshot_is_found_out() -> None:
    config = GOOD_CONFIG.replace("CONFIG_VMGENID=m\n", "").removesuffix("\nCONFIG_VMGENID=m")
    assert find_missing_options(config) == ("CONFIG_VMGENID=y|m",)


def test_what_containers_miss_is_told_apart_from_what_a_boot_needs() -> None:
    containers = "\n".join(
        option.replace("=y|m", "=m") for option in find_missing_container_options("")
    )
    assert find_missing_container_options(containers) == ()
    lacking = containers.replace("CONFIG_MEMCG=y", "").replace("CONFIG_NFT_MASQ=m", "")
    assert find_missing_container_options(lacking) == ("CONFIG_MEMCG=y", "CONFIG_NFT_MASQ=y|m")
    assert find_missing_options(f"{GOOD_CONFIG}\n{lacking}") == ()


def test_the_base_initrd_lists_its_modules_in_load_order(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"agent 1")
    initrd = tmp_path / "initrd.img"
    modules = build_module_members({"kernel/b.ko": b"B", "kernel/net/a.ko": b"A"})
    write_base_initrd(initrd, agent=agent, modules=modules)
    with initrd.open("rb") as f:
        found = {member.name: member for member in read_members(f)}
    assert found["banger/modules"].content == b"/banger/ko/b.ko\n/banger/ko/a.ko\n"
    assert found["banger/ko/a.ko"].content == b"A"
    assert found["init"].mode & 0o7777 == 0o755
    assert found["dev/console"].rdev == (5, 1)


def test_a_base_initrd_can_be_written_anew_with_another_agent(tmp_path: Path) -> None:
    for version in (b"agent 1", b"agent 2"):
        (tmp_path / "agent").write_bytes(version)
        old = tmp_path / "agent 1.img"
        modules = (
            tuple(read_module_members(old))
            if old.exists()
            else build_module_members({"a.ko": b"A"})
        )
        write_base_initrd(
            tmp_path / f"{version.decode()}.img", agent=tmp_path / "agent", modules=modules
        )
    one, two = ((tmp_path / f"agent {n}.img").read_bytes() for n in (1, 2))
    assert two == one.replace(b"agent 1", b"agent 2")


def test_a_distributions_own_initrd_is_refused(tmp_path: Path) -> None:
    write_members(tmp_path / "foreign.img", ())
    with pytest.raises(ValueError, match="no base initrd"):
        list(read_module_members(tmp_path / "foreign.img"))
