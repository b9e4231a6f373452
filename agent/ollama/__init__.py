"""The Ollama beside an agent."""
