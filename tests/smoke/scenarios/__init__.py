"""The scenarios, by topic. A module that is named here is run; its functions register themselves."""

from tests.smoke.scenarios import (  # isort: skip - the order in which they are shown
    commands,
    lifecycle,
    workspace,
    network,
    refusals,
    jail,
    services,
)

__all__ = ["commands", "jail", "lifecycle", "network", "refusals", "services", "workspace"]
