"""Faster implementations of decode steps."""
