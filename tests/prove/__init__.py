"""Long and absolute measurements: `make prove` runs them, tests only try that they work."""
