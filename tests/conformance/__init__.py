"""Real clients against the router in front of simulated nodes, and the page that says what came of it."""
