"""The coordinator's web app: management, the fleet as one Ollama, health. Decode, apply, encode."""
