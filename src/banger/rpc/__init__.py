"""The wire: lines, frames, descriptors. One implementation for daemon, helper and agent calls."""
