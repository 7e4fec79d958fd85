"""The frozen reference model: its fingerprint, and its losses stored beside the shards."""
