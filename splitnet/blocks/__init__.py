"""Spans of a model's blocks, their caches and passes, and the client's part of a model."""
