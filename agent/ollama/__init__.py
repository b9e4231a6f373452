"""The local Ollama: its API client, and finding, starting and watching it."""
