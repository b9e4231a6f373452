"""The daemon that runs beside one Ollama: `python -m agent`."""
