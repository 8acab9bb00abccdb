"""Measures a swarm."""
