"""The coordinator's management routes."""
