"""Tests of `agent.observe`."""
