"""What outlives a restart: history, agents, keys, tasks, policy, counters; in SQLite or PostgreSQL."""
