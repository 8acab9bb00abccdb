"""Finds what is wrong with a machine, and with its way to a swarm."""
