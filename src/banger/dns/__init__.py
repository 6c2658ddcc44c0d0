"""The `.vm` zone: an authoritative name server on loopback for the VMs that run now."""
