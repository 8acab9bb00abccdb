"""Finds threads and child processes that a test leaves running, except for those of fixtures with a wider scope.

This module also ends all processes of an interrupted test run, which are recognised by an inherited environment
variable.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

RUN_MARK = "TESTS_OF_SPLITNET"
"""The environment variable that marks all processes of a test run."""
GRACE_SECONDS = 30.0
"""Seconds that a test's threads and processes may take to end after the test."""

SHARED_THREADS = ("tqdm", "TMonitor", "Thread-auto_conversion", "GarbageCollectorThread")
SHARED_CHILDREN = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "bounded_program.py",
)
"""Helper processes that start once and stay for the life of the process."""

_owned_threads: set[threading.Thread] = set()
_owned_children: set[psutil.Process] = set()


class Running:
    """The current threads and children, for a later comparison."""

    def __init__(self) -> None:
        self.threads = set(threading.enumerate())
        self.children = set(_children())


@contextmanager
def outliving_tests() -> Iterator[None]:
    """Threads and processes that start inside the `with` belong to a fixture of a wider scope, which ends them
    later."""
    before = Running()
    yield
    now = Running()
    _owned_threads.update(now.threads - before.threads)
    _owned_children.update(now.children - before.children)


def end_leftovers(before: Running) -> list[str]:
    """The threads and processes that started after `before` and still run after the grace period. Kills the
    processes."""
    deadline = time.monotonic() + GRACE_SECONDS
    expected = before.threads | _owned_threads
    # This waits without `join`, because the list may have a thread that has not started yet.
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
    """Ends all processes with this mark except this process: the workers of an interrupted run are killed before their
    fixtures can end. Returns the ids of the ended processes."""
    left: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) == mark:
                process.terminate()
                left.append(process)
        except psutil.Error:
            continue  # The process belongs to another user, or has just ended.
    for process in psutil.wait_procs(left, timeout=GRACE_SECONDS)[1]:
        process.kill()
    return [process.pid for process in left]


def _unexpected(expected: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in expected and not _is_shared(thread)]


def _is_shared(thread: threading.Thread) -> bool:
    return thread.name.startswith(SHARED_THREADS) or type(thread).__name__ in SHARED_THREADS


def _children() -> list[psutil.Process]:
    if hasattr(os, "waitid"):  # Most tests have no children, and a search takes milliseconds.
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not any(shared in _command_line(child) for shared in SHARED_CHILDREN)]


def _with_ancestors(process: psutil.Process) -> list[psutil.Process]:
    """The process and its ancestors: a daemon of a wider scope may start its own processes at any time."""
    try:
        return [process, *process.parents()]
    except psutil.Error:
        return [process]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
