"""Room: the authoritative name server of the `.vm` zone."""
