"""What an agent sees of its machine."""
