"""Service: the installed services of system mode (files, units, records)."""
