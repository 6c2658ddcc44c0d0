"""What banger holds on a host: processes, links, nft elements, cgroups, mounts, sockets, rows.

Read from the kernel, the system's own tools and the files themselves, never from banger, so that it
can judge what banger says. A census is a multiset: what is the same in kind counts, however it is
numbered, so that a VM that was started anew is no difference. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STATE = Path("/var/lib/banger")
RUNTIME = Path("/run/banger")
HELPER_RUNTIME = Path("/run/banger-root")
JAILS = Path("/var/lib/banger-root/jail")
DNS_PORT = 42069
# Taps that wait for a VM are capacity, not leftovers.
_POOLED = re.compile(r"tap-pool-\d+")
_DESCRIPTOR = re.compile(r"^/proc/self/fd/\d+/")
_TAP = re.compile(r"tap-(fc|pool)-[0-9a-f]+")


def vmm_processes() -> dict[int, str]:
    """Every process that runs a VMM: pid and program file."""
    found = {}
    for exe in Path("/proc").glob("[0-9]*/exe"):
        try:
            program = exe.readlink()
        except OSError:  # a kernel thread, or it ended just now
            continue
        if program.name.removesuffix(" (deleted)").startswith(("firecracker", "qemu-system")):
            found[int(exe.parent.name)] = str(program)
    return found


def banger_processes() -> Iterator[str]:
    """Daemons, helpers and what else runs from banger's programs, by their command lines."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(word in ("-m", "--serve") for word in words) or any("bangerd" in w for w in words):
            names = [Path(word).name for word in words if "banger" in word]
            if names:
                yield f"process {' '.join(names)}"


def links() -> Iterator[str]:
    """Network links, without the bridge itself, which stays for the next VM, and pooled taps."""
    for row in json.loads(_output("ip", "-j", "-d", "link", "show")):
        if row.get("linkinfo", {}).get("info_kind") == "bridge":
            continue
        if not _POOLED.fullmatch(row["ifname"]):
            yield f"link {row['ifname']}"


def ruleset() -> list[dict[str, Any]]:
    """Everything in nftables, as its own JSON."""
    entries: list[dict[str, Any]] = json.loads(_output("nft", "-j", "list", "ruleset"))["nftables"]
    return entries


def nft_elements(family: str, name: str) -> list[Any]:
    """Elements of one set of banger's table of that family; empty when there is no such set."""
    return [
        element
        for entry in ruleset()
        if "set" in entry
        and (entry["set"]["table"], entry["set"]["family"]) == ("banger", family)
        and entry["set"]["name"] == name
        for element in entry["set"].get("elem", [])
    ]


def _all_elements() -> Iterator[str]:
    for entry in ruleset():
        if "set" in entry and entry["set"]["table"] == "banger":
            for element in entry["set"].get("elem", []):
                text = _TAP.sub("tap", json.dumps(element))
                yield f"element of {entry['set']['name']}: {text}"


def cgroups() -> Iterator[str]:
    """Control groups of VMs, wherever the hierarchy puts them."""
    root = Path("/sys/fs/cgroup")
    for path in [*root.glob("**/banger-vm-*"), *root.glob("**/banger/*/cgroup.procs")]:
        yield f"cgroup {path.relative_to(root)}"


def mounts() -> Iterator[str]:
    """Mount points of the host's own namespace."""
    for line in Path("/proc/1/mountinfo").read_text().splitlines():
        yield f"mount {line.split()[4]}"


def sockets() -> Iterator[str]:
    """Unix sockets with a path that listen (flag __SO_ACCEPTCON of /proc/net/unix)."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and int(words[3], 16) & 0x10000 and "banger" in words[7]:
            # A daemon binds its socket by way of the directory's descriptor.
            yield f"socket {_DESCRIPTOR.sub('', words[7])}"


def files() -> Iterator[str]:
    """Directories of VMs and jails, leases, and the host keys that are known."""
    for root in (STATE / "vms", RUNTIME / "vms", JAILS / "firecracker"):
        yield from (f"directory {path}" for path in root.glob("*"))
    # The ledger's own lock is not a lease.
    yield from (f"lease {path.stem}" for path in (HELPER_RUNTIME / "leases").glob("*.json"))
    known = STATE / "ssh" / "known_hosts"
    if known.is_file():
        yield from (f"known host {line.split()[0]}" for line in known.read_text().splitlines())


def rows() -> Iterator[str]:
    """VMs in the database, from a copy: reading it in place would make files of root's there."""
    if not (STATE / "banger.db").is_file():
        return
    copied = None
    while copied is None:
        with tempfile.TemporaryDirectory() as directory:
            copied = _read_copy(Path(directory))
    yield from (f"row {vm_id}" for vm_id in copied)


def _read_copy(directory: Path) -> list[str] | None:
    """The ids of all VMs; None when the daemon wrote while the files were copied: a database with
    the log of another moment is a damaged one."""
    before = _database_files()
    try:
        for path in before:
            shutil.copy(path, directory)
    except FileNotFoundError:
        return None
    if _database_files() != before:
        return None
    connection = sqlite3.connect(directory / "banger.db")
    try:
        return [vm_id for (vm_id,) in connection.execute("SELECT id FROM vms")]
    finally:
        connection.close()


def _database_files() -> dict[Path, tuple[int, int, int]]:
    found = {}
    for path in STATE.glob("banger.db*"):
        with contextlib.suppress(FileNotFoundError):
            st = path.stat()
            found[path] = (st.st_ino, st.st_size, st.st_mtime_ns)
    return found


def take_census() -> Counter[str]:
    """Everything above; what one has more than another came in between."""
    parts: tuple[Iterable[str], ...] = (
        (f"process {Path(program).name}" for program in vmm_processes().values()),
        banger_processes(),
        links(),
        _all_elements(),
        cgroups(),
        mounts(),
        sockets(),
        files(),
        rows(),
    )
    return Counter(line for part in parts for line in part)


def dns_address(name: str, timeout_s: float = 120) -> str | None:
    """What banger's own server answers for `<name>.vm` (RFC 1035 §4): an address, or None.

    Raises:
        OSError: nobody listens there, or no answer came.
        ValueError: the answer is not one to this question.
    """
    labels = b"".join(bytes([len(part)]) + part.encode() for part in (name, "vm"))
    question = labels + b"\0" + struct.pack(">HH", 1, 1)
    ident = os.urandom(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(timeout_s)
        s.connect(("127.0.0.1", DNS_PORT))
        s.send(ident + struct.pack(">HHHHH", 0x0100, 1, 0, 0, 0) + question)
        answer = s.recv(4096)
    if answer[:2] != ident or question not in answer:
        raise ValueError(f"not an answer to {name}.vm: {answer.hex()}")
    count = struct.unpack_from(">H", answer, 6)[0]
    if count == 0:
        return None
    # One A record; its data are the last four bytes unless an OPT record follows, which needs EDNS.
    return socket.inet_ntoa(answer[-4:]) if answer[3] & 0x0F == 0 else None


def _output(*argv: str) -> bytes:
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
