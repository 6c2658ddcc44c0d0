"""Service: long-lived commands in a guest, by name."""
