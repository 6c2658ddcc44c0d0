"""A VM record with nothing special about it."""

from __future__ import annotations

from banger.api.records import VmRecord
from banger.names import new_vm_id


def build_record(name: str, address: str) -> VmRecord:
    """A VM that was just made."""
    return VmRecord(
        id=new_vm_id(),
        name=name,
        state="created",
        image_id="i",
        image="debian",
        kernel="k",
        vcpu=1,
        memory_mib=512,
        overlay_bytes=1,
        work_disk_bytes=1,
        address=address,
        mac="",
        network="bridge",
    )
