"""The check that a test leaves no thread or process running."""

from __future__ import annotations

import subprocess
import sys

import pytest
from psutil import Process

from tests import leftovers
from tests.leftovers import Running, end_leftovers

SPAWNER = """
import subprocess, sys
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
child.communicate(b"\\n")
"""


@pytest.mark.parametrize("wider", [True, False])
def test_only_processes_of_fixtures_of_a_wider_scope_may_stay(wider: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DHT node of a gateway pauses, and restarts its process during any later test."""
    monkeypatch.setattr(leftovers, "GRACE_SECONDS", 0.2)
    with subprocess.Popen([sys.executable, "-c", SPAWNER], stdin=-1, stdout=-1, text=True) as spawner:
        assert spawner.stdin and spawner.stdout
        before = Running()
        before.children.discard(Process(spawner.pid))
        if wider:
            monkeypatch.setattr(leftovers, "_owned_children", {Process(spawner.pid)})
        print(file=spawner.stdin, flush=True)
        child = int(spawner.stdout.readline())
        left = end_leftovers(before)
        assert any(f"process {child}:" in line for line in left) is not wider
        assert any(f"process {spawner.pid}:" in line for line in left) is not wider
        if wider:
            print(file=spawner.stdin, flush=True)
