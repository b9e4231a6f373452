"""What-if studies of a fleet: files in, many simulated runs, tables and plots out."""
