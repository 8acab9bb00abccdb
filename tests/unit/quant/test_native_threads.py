"""OpenMP has helper threads for each computing thread: none may remain after a thread has finished its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells the threads of a process")

COUNT = """
import os, sys, threading, time, torch
from splitnet.quant.device import end_threads
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task")) - threading.active_count()

def helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count() - before

def expect(count):  # threads that are told to end take a moment
    deadline = time.monotonic() + 10
    while helpers() != count:
        assert time.monotonic() < deadline, f"{helpers()} threads help, not {count}"
        time.sleep(0.001)

def work():
    torch.ones(1 << 20).sum()
"""

ENDED = """
work()
expect(2)
end_threads()
expect(0)
work()
expect(2)
"""

PEER = """
from unittest.mock import Mock
from peers.counters import Counters
from peers.peer_links import NextHops
from peers.peer_options import PeerOptions
from peers.running_peer import SpanServer
from peers.speed import measure_speed
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.blocks.span import Span
checkpoint, outbox = Checkpoint.open(sys.argv[1]), Mock()
span = Span.load(checkpoint, 0, 2)
work()
server = SpanServer(
    checkpoint,
    span,
    measure_speed(span),
    outbox,
    NextHops(outbox),
    PeerOptions(kv_memory=1 << 20, training_memory=0),
    Counters(),
    sign=bytes,
)
server.engine.start()
ran = threading.Event()
server.service.queue.put_idle_job(lambda: (work(), ran.set()))
assert ran.wait(20)
expect(2)
server.close()
expect(0)
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT + code, *arguments], capture_output=True, text=True, timeout=100)
    assert not done.returncode, done.stderr


def test_a_thread_ends_its_helpers() -> None:
    run(ENDED)


@pytest.mark.full
def test_helpers_of_loading_and_measuring_are_gone_when_a_peer_serves(tmp_path: Path) -> None:
    run(PEER, str(random_checkpoint("llama", tmp_path)))
