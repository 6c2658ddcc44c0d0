"""What banger holds on a host: processes, links, nft elements, cgroups, mounts, files.

Read from the kernel and the system's own tools, never from banger, so that it can judge what banger
says. Runs in the nested host: standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path


def vmm_processes() -> list[str]:
    """Every process that runs a VMM, by its program file."""
    found = []
    for exe in Path("/proc").glob("[0-9]*/exe"):
        try:
            program = os.readlink(exe)
        except OSError:  # a kernel thread, or it ended just now
            continue
        if Path(program.removesuffix(" (deleted)")).name.startswith(("firecracker", "qemu-system")):
            found.append(f"process {exe.parent.name} {program}")
    return found


def links() -> list[str]:
    """Network links, without the bridge itself, which stays for the next VM."""
    rows = json.loads(_output("ip", "-j", "-d", "link", "show"))
    return [
        f"link {row['ifname']}"
        for row in rows
        if row.get("linkinfo", {}).get("info_kind") != "bridge"
    ]


def nft_elements() -> list[str]:
    """Elements of the sets in banger's tables."""
    document = json.loads(_output("nft", "-j", "list", "ruleset"))
    return [
        f"element of {entry['set']['table']} {entry['set']['name']}: {element}"
        for entry in document["nftables"]
        if "set" in entry and entry["set"]["table"] == "banger"
        for element in entry["set"].get("elem", [])
    ]


def cgroups() -> list[str]:
    """Control groups of VMs, wherever the hierarchy puts them."""
    root = Path("/sys/fs/cgroup")
    found = [*root.glob("**/banger-vm-*"), *root.glob("banger/*/cgroup.procs")]
    return [f"cgroup {path.relative_to(root)}" for path in found]


def mounts() -> list[str]:
    """Mount points."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount {line.split()[4]}" for line in lines]


def vm_files() -> list[str]:
    """Files of VMs in the state and runtime directories, leases included."""
    roots = (
        Path(os.environ["XDG_STATE_HOME"]) / "banger" / "vms",
        Path(os.environ["XDG_RUNTIME_DIR"]) / "banger" / "vms",
        Path(os.environ["XDG_RUNTIME_DIR"]) / "banger" / "leases",
    )
    return [
        f"file {path}"
        for root in roots
        for path in sorted(root.glob("*"))
        # The ledger's own lock is not a lease.
        if not (root.name == "leases" and path.suffix != ".json")
    ]


def take_census() -> set[str]:
    """Everything above; the difference of two is what happened in between."""
    parts = (vmm_processes, links, nft_elements, cgroups, mounts, vm_files)
    return {line for part in parts for line in part()}


def _output(*argv: str) -> bytes:
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
