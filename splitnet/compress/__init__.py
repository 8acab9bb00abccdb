"""Compression of a model's blocks by what passes through them: each peer rounds its own blocks."""
