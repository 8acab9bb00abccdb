"""Cuts a model over known devices."""
