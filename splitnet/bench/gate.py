"""Clients that run at once, and wait for each other before what is measured of all of them together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")


class Gate:
    """Opens when all clients have come to it.

    Args:
        clients: how many.

    Attributes:
        opened_at: by `time.perf_counter`.
    """

    def __init__(self, clients: int) -> None:
        self.opened_at = 0.0
        self._barrier = threading.Barrier(clients, action=self._open)

    def wait(self) -> None:
        """Waits for all clients.

        Raises:
            threading.BrokenBarrierError: one of them has failed, so it makes no sense to go on.
        """
        self._barrier.wait()

    def check(self) -> None:
        """Raises, as `wait`, if a client has failed."""
        if self._barrier.broken:
            raise threading.BrokenBarrierError

    def give_up(self) -> None:
        """Has all clients end at the gate, or at their next `check`."""
        self._barrier.abort()

    def _open(self) -> None:
        self.opened_at = time.perf_counter()


def run_together(clients: Sequence[Callable[[], Result]], gate: Gate) -> list[Result]:
    """The results of clients that run at once, each in a thread of its own; a single one runs in this thread.

    Raises:
        Exception: what the first client that failed raised; the others have ended by then.
    """
    if len(clients) == 1:
        return [clients[0]()]
    with ThreadPoolExecutor(len(clients), thread_name_prefix="splitnet-bench") as pool:
        running = [pool.submit(client) for client in clients]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failed = any(each.exception() is not None for each in done)
        except BaseException:
            gate.give_up()
            raise
        if failed:
            gate.give_up()
    errors = [error for each in running if (error := each.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [each.result() for each in running]
