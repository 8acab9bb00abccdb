"""Hosts on an emulated network on this machine: see docs/netlab.md."""

from .lab import Lab, LabError

__all__ = ["Lab", "LabError"]
