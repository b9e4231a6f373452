"""Decides. No clock, no dice, no sockets, no files, no logging: time and randomness are arguments, everything done is an effect."""
