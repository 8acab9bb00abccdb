"""Faster ways for decode steps."""
