"""Hosts on an emulated network on this machine: see docs/netlab.md."""

from .errors import LabError
from .lab import Lab
from .router import NAMED, Router

__all__ = ["NAMED", "Lab", "LabError", "Router"]
