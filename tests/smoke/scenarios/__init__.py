"""The scenarios, by topic. What a module that is named here registers, is run."""

from tests.smoke.scenarios import (  # isort: skip - the order in which they are shown
    commands,
    lifecycle,
    workspace,
    changes,
    network,
    refusals,
    jail,
    faults,
    services,
    figures,
)

__all__ = [
    "changes",
    "commands",
    "faults",
    "figures",
    "jail",
    "lifecycle",
    "network",
    "refusals",
    "services",
    "workspace",
]
