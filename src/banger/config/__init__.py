"""Settings, paths and host defaults: read once at start, passed down as values."""
