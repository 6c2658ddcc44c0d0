"""Keys and known_hosts of banger's own: made here, never the user's files."""
