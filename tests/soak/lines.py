"""Every line that is measured: its name in the CSV, its words, its picture, and its bound.

What belongs to objects of the kernel or to files may not grow at all: half of one, because the
slope of a count is a fraction. Memory and times have bounds that are shares of their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.soak.judge import Bound

MEMORY = Bound(share=0.05)
COUNT = Bound(amount=0.5)
LATENCY = Bound(share=0.25)

VERBS = (
    "create", "exec", "prepare", "export", "session", "stop", "start", "delete", "list",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    name: str
    words: str
    unit: str
    picture: str
    bound: Bound


LINES = (
    Line("daemon_rss_kib", "daemon, resident memory", "KiB", "memory", MEMORY),
    Line("helper_rss_kib", "root helper, resident memory", "KiB", "memory", MEMORY),
    Line("agent_rss_kib", "agent of a VM that stays, resident memory", "KiB", "memory", MEMORY),
    Line("daemon_fds", "daemon, descriptors", "", "descriptors", COUNT),
    Line("helper_fds", "root helper, descriptors", "", "descriptors", COUNT),
    Line("agent_fds", "agent, descriptors", "", "descriptors", COUNT),
    Line("daemon_tasks", "daemon, coroutines under way", "", "descriptors", COUNT),
    Line("daemon_threads", "daemon, threads", "", "descriptors", COUNT),
    Line("interfaces", "network interfaces", "", "holdings", COUNT),
    Line("nft_elements", "nftables elements", "", "holdings", COUNT),
    Line("cgroups", "cgroups of VMs", "", "holdings", COUNT),
    Line("leases", "leases", "", "holdings", COUNT),
    Line("processes", "processes of banger", "", "holdings", COUNT),
    Line("files", "files in state and runtime directory", "", "holdings", COUNT),
    Line("state_kib", "state directory without VMs and logs", "KiB", "holdings", MEMORY),
    *(Line(f"{verb}_ms", f"`{verb}`", "ms", "latency", LATENCY) for verb in VERBS),
)
PICTURES = {
    "memory": "Resident memory",
    "descriptors": "Descriptors, coroutines, threads",
    "holdings": "What is held on the host",
    "latency": "Latency of each verb",
}
