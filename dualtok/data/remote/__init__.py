"""Folders and files at an address: storage, connections, cache."""
