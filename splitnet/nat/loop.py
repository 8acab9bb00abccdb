"""The thread in which all streams of a process are, with an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

CARRYING = "carrying"
"""Tasks of this name pass bytes on until one side ends."""
LINGER_S = 0.5
END_S = 5.0


class WaysLoop:
    """Starts its thread with the first thing that is to run there. Thread-safe; close it when done."""

    def __init__(self) -> None:
        self._loop: asyncio.SelectorEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine beside all others. Once the loop is closed, the future is cancelled."""
        with self._lock:
            if self._closed:
                coroutine.close()
                cancelled: Future[T] = Future()
                cancelled.cancel()
                return cancelled
            if self._loop is None:
                self._loop = asyncio.SelectorEventLoop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name="splitnet-ways", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
        """Runs a coroutine as a task that `end` ends; None: the loop is closed."""
        with suppress(CancelledError):
            return self.run(_begun(coroutine)).result()
        coroutine.close()
        return None

    def end(self, task: asyncio.Task[Any]) -> None:
        """Cancels a task, and waits for its end, but for some seconds only: others wait for who ends it."""
        with suppress(CancelledError, TimeoutError):  # the loop has ended, and all with it
            self.run(_ended(task)).result(END_S)

    def close(self) -> None:
        """Cancels what runs, and ends the thread. May be called more than once.

        What carries bytes has half a second to end by itself, so that those on their way arrive.
        """
        with self._lock:
            already, self._closed = self._closed, True
        if self._loop is not None and self._thread is not None and not already:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()


async def _begun(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return asyncio.get_running_loop().create_task(coroutine)


async def _ended(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _run(loop: asyncio.SelectorEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        carrying = [task for task in asyncio.all_tasks(loop) if task.get_name() == CARRYING]
        if carrying:
            loop.run_until_complete(asyncio.wait(carrying, timeout=LINGER_S))
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
