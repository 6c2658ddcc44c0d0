"""The host's side of the guest agent: its configuration, its announcement, calls to it."""
