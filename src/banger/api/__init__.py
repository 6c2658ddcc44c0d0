"""The contract: records, parameters and results that cross the daemon's socket."""
