"""Tests of `agent.ollama`."""
