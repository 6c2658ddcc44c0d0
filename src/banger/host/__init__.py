"""Room: what a VM holds on the host (leases of the root helper) and the VMM process itself."""
