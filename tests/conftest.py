"""What all tests share: one thread for torch, the demo checkpoint, and no test may leave anything running."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported; peer daemons inherit it. Tests share few cores, and one thread keeps sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import psutil
import pytest

from splitnet.errors import SplitnetError
from splitnet.model import demo

# A busy machine must not fail a property by its clock.
hypothesis.settings.register_profile("splitnet", deadline=None)
hypothesis.settings.load_profile("splitnet")

GRACE_SECONDS = 5.0
"""How long what a test started may take to end after the test."""

SHARED_THREADS = ("tqdm", "TMonitor", "Thread-auto_conversion", "GarbageCollectorThread")
SHARED_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Helpers that libraries start once and keep for the life of the process."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare the demo checkpoint before the first test: a slow download must not run into a test's timeout."""
    wanted = any("demo_checkpoint" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    try:
        demo.demo_checkpoint()
    except SplitnetError:
        return  # The fixture raises it again, in the tests that need the checkpoint.


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct as sharded float32 safetensors."""
    return demo.demo_checkpoint()


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fail a test that leaves a thread or a child process behind; fixtures of a wider scope may keep theirs."""
    threads_before, children_before = set(threading.enumerate()), set(_children())
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    threads = [thread for thread in threading.enumerate() if thread not in threads_before and not _is_shared(thread)]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    children = [child for child in _children() if child not in children_before]
    _, alive = psutil.wait_procs(children, timeout=max(0.0, deadline - time.monotonic()))
    left = [f"thread {thread.name}" for thread in threads if thread.is_alive()]
    for child in alive:
        left.append(f"process {child.pid}: {_command_line(child)}")
        child.kill()
    if left:
        pytest.fail(f"The test left running: {'; '.join(left)}", pytrace=False)


def _is_shared(thread: threading.Thread) -> bool:
    return thread.name.startswith(SHARED_THREADS) or type(thread).__name__ in SHARED_THREADS


def _children() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not any(shared in _command_line(child) for shared in SHARED_CHILDREN)]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
