"""Service: what is wrong with this host or installation, and the command that mends it."""
