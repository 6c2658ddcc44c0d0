"""The command line: parses, asks the daemon, draws. It knows the contract and the wire only."""
