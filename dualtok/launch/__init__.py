"""Start a run on what a cluster has: pure functions from settings to scripts, one file per way to start ranks."""
