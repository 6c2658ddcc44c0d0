"""An installation of the soak's own, and what can be counted of it from outside.

It is that of the boot tests, with commands that a terminal's Ctrl-C does not reach, so that a cycle
that was begun ends in order. Counts come from the kernel and the files; only the number of
coroutines is the daemon's own word.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.boot.installation import SMALL, Installation

KEEPER = "keeper"
# Logs have bounds of their own (docs/reliability.md), disks of VMs are what their guests write.
_NOT_COUNTED = ("bangerd.log", "banger-root.log", "console.log", "-wal", "-shm", "-journal")
_IN_GUEST = """
for p in /proc/[0-9]*; do
    case "$(tr '\\0' ' ' < $p/cmdline 2>/dev/null)" in
    *banger-vsock-agent*|/init*)
        awk '/^VmRSS/ { print $2 }' $p/status; ls $p/fd | wc -l; exit ;;
    esac
done
"""


class Ground(Installation):
    """Where the cycles run. `furnish` first, `close` at the end."""

    def popen(self, *words: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        return super().popen(*words, start_new_session=True, **kwargs)

    def configure(self) -> None:
        """As a user's: without the debug log of the boot tests."""
        text = self.config.read_text().replace('log_level = "debug"', 'log_level = "info"')
        self.config.write_text(text)

    def start_keeper(self) -> None:
        """The VM that stays for the whole run."""
        self.ok("vm", "create", "--name", KEEPER, *SMALL)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json("daemon", "status", "--json")
        return found

    def sample(self) -> dict[str, float]:
        """Every line but the latencies; take it when no VM but the keeper is there."""
        status = self.status()
        daemon = read_process(status["pid"])
        helper = self._helper()
        words = self.ok("vm", "exec", KEEPER, "--", "sh", "-c", _IN_GUEST).text.split()
        if len(words) != 2:
            raise AssertionError(f"the agent was not found in its guest: {words}")
        return {
            "daemon_rss_kib": daemon["rss_kib"],
            "daemon_fds": daemon["fds"],
            "daemon_threads": daemon["threads"],
            "daemon_tasks": status["tasks"],
            "helper_rss_kib": helper["rss_kib"],
            "helper_fds": helper["fds"],
            "agent_rss_kib": float(words[0]),
            "agent_fds": float(words[1]),
            "interfaces": len(os.listdir("/sys/class/net")),
            "nft_elements": count_elements(),
            "cgroups": self._cgroups(),
            "leases": len(list((self.runtime / "leases").glob("*.json"))),
            "processes": len({status["pid"], *self.processes()}),
            **self._files(),
        }

    def processes(self) -> list[int]:
        """Helper and VMMs: what names one of our directories, or works in one."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                    where = os.readlink(entry / "cwd")
                except OSError:
                    continue
                if str(self.root) in words or where.startswith(str(self.root)):
                    found.append(int(entry.name))
        return found

    def _helper(self) -> dict[str, float]:
        """All zeros where there is none: without root there are no leases."""
        ledger = str(self.runtime / "leases")
        for pid in self.processes():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "--ledger" in words and ledger in words and "sudo" not in words[0]:
                return read_process(pid)
        return {"rss_kib": 0, "fds": 0, "threads": 0}

    def _cgroups(self) -> int:
        """Those with the mark of our ledger; others of this host may come and go. 0: there are
        none, or none may be marked."""
        path = self.handles(KEEPER).get("cgroup")
        if path is None:
            return 0
        ours = find_mark(Path(path))
        return sum(find_mark(sibling) == ours for sibling in Path(path).parent.iterdir())

    def _files(self) -> dict[str, float]:
        files, blocks = 0, 0
        for top in (self.state, self.runtime):
            for directory, _, names in os.walk(top):
                for name in names:
                    if any(part in name for part in _NOT_COUNTED):
                        continue
                    files += 1
                    if not directory.startswith(str(self.state / "vms")):
                        blocks += os.lstat(os.path.join(directory, name)).st_blocks
        return {"files": files, "state_kib": blocks / 2}

    def end(self) -> None:
        """Leave nothing: VMs, daemon, directory."""
        try:
            self.close()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)


def read_process(pid: int) -> dict[str, float]:
    """Memory, descriptors and threads of a process (proc_pid_status(5))."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "rss_kib": float(fields["VmRSS"].split()[0]),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": float(fields["Threads"]),
    }


def count_elements() -> int:
    """Elements of all sets of banger's tables; 0 where nobody may look."""
    done = subprocess.run(["nft", "-j", "list", "ruleset"], capture_output=True, check=False)
    if done.returncode != 0:
        return 0
    return sum(
        len(entry["set"].get("elem", []))
        for entry in json.loads(done.stdout)["nftables"]
        if "set" in entry and entry["set"]["table"] == "banger"
    )


def find_mark(path: Path) -> bytes | None:
    """What the helper wrote on a cgroup that it made."""
    try:
        return os.getxattr(path, "trusted.banger")
    except OSError:  # no cgroup, gone meanwhile, or attributes cannot be kept
        return None
