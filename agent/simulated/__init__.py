"""A simulated Ollama on a real socket, for the demo and for tests. It always says that it is simulated."""
