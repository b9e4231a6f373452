"""The world in a box: what a fleet does, in virtual time, from a seed."""
