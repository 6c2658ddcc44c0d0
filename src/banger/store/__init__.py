"""The database: which VMs there are. One connection, owned by the daemon."""
