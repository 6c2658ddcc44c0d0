"""VMs: created, started, watched, stopped, deleted, and found again after a crash."""
