"""The scenarios, by topic. What a module that is named here registers, is run."""

from tests.smoke.scenarios import (  # isort: skip - the order in which they are shown
    commands,
    lifecycle,
    workspace,
    changes,
    agents,
    network,
    refusals,
    jail,
    services,
    power,
    figures,
)

__all__ = [
    "agents",
    "changes",
    "commands",
    "figures",
    "jail",
    "lifecycle",
    "network",
    "power",
    "refusals",
    "services",
    "workspace",
]
