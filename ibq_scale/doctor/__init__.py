"""What stands between this machine and a run: checks, each a small function that returns lines."""
