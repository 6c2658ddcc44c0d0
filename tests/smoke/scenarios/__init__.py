"""The scenarios, by topic. What a module that is named here registers, is run."""

from tests.smoke.scenarios import (  # isort: skip - the order in which they are shown
    commands,
    lifecycle,
    workspace,
    changes,
    agents,
    network,
    refusals,
    images,
    jail,
    faults,
    services,
    power,
    figures,
)

__all__ = [
    "agents",
    "changes",
    "commands",
    "faults",
    "figures",
    "images",
    "jail",
    "lifecycle",
    "network",
    "power",
    "refusals",
    "services",
    "workspace",
]
