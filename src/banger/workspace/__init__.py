"""Workspaces: what of a git repository goes into a guest, and how it is packed on the host."""
