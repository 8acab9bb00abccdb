"""Weights in few bits: layouts, linear layers and experts over them, and the choice of a format."""
