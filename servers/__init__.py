"""The coordinator: `python -m servers`."""
