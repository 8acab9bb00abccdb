"""Hosts on an emulated network on this machine: see docs/netlab.md."""

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab
from benchmarks.netlab.router import NAMED, Router

__all__ = ["NAMED", "Lab", "LabError", "Router"]
