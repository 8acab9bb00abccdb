"""What a test leaves running: threads and child processes, but for those that fixtures of a wider scope own.

And what a run of tests leaves that was interrupted: whatever has inherited its mark.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

RUN_MARK = "TESTS_OF_SPLITNET"
"""The variable that marks all processes of a run of tests."""
GRACE_SECONDS = 30.0
"""How long what a test started may take to end after the test."""

SHARED_THREADS = ("tqdm", "TMonitor", "Thread-auto_conversion", "GarbageCollectorThread")
SHARED_CHILDREN = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "bounded_program.py",
)
"""Helpers that are started once and kept for the life of the process."""

_owned_threads: set[threading.Thread] = set()
_owned_children: set[psutil.Process] = set()


class Running:
    """What runs now, to compare with later."""

    def __init__(self) -> None:
        self.threads = set(threading.enumerate())
        self.children = set(_children())


@contextmanager
def outliving_tests() -> Iterator[None]:
    """What is started meanwhile belongs to a fixture of a wider scope, which ends it."""
    before = Running()
    yield
    now = Running()
    _owned_threads.update(now.threads - before.threads)
    _owned_children.update(now.children - before.children)


def end_leftovers(before: Running) -> list[str]:
    """What was started since and still runs after a while; processes are killed."""
    deadline = time.monotonic() + GRACE_SECONDS
    expected = before.threads | _owned_threads
    # Not joined: one that is about to start is among them already, and cannot be.
    while (threads := _unexpected(expected)) and time.monotonic() < deadline:
        time.sleep(0.01)
    owned = before.children | _owned_children
    children = [child for child in _children() if not owned.intersection(_with_ancestors(child))]
    _, alive = psutil.wait_procs(children, timeout=max(0.0, deadline - time.monotonic()))
    left = [f"thread {thread.name}" for thread in threads]
    for child in alive:
        left.append(f"process {child.pid}: {_command_line(child)}")
        child.kill()
    return left


def end_run(mark: str) -> list[int]:
    """Ends all processes with this mark but this one, as workers of an interrupted run are killed before their
    fixtures end; returns their ids."""
    left: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) == mark:
                process.terminate()
                left.append(process)
        except psutil.Error:
            continue  # of another user, or it has just ended
    for process in psutil.wait_procs(left, timeout=GRACE_SECONDS)[1]:
        process.kill()
    return [process.pid for process in left]


def _unexpected(expected: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in expected and not _is_shared(thread)]


def _is_shared(thread: threading.Thread) -> bool:
    return thread.name.startswith(SHARED_THREADS) or type(thread).__name__ in SHARED_THREADS


def _children() -> list[psutil.Process]:
    if hasattr(os, "waitid"):  # most tests have none, and to look through all processes takes milliseconds
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not any(shared in _command_line(child) for shared in SHARED_CHILDREN)]


def _with_ancestors(process: psutil.Process) -> list[psutil.Process]:
    """The process and its ancestors: a daemon of a wider scope may start processes of its own at any time."""
    try:
        return [process, *process.parents()]
    except psutil.Error:
        return [process]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
