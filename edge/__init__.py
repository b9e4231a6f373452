"""Moves bytes between clients and nodes: HTTP/1.1 over Trio, and the proxy paths. Knows the core, never the programs above it."""
