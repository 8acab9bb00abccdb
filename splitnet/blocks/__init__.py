"""Blocks of a model: spans of them, their caches and passes, and the client's part beside them."""
