"""What `make` runs: setting up a checkout and checking it. Standard library only."""
