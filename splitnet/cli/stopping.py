"""How a daemon learns that it should end.

A handler that raises does so anywhere: in the middle of an import, where libraries catch what they do not expect and go
on with half a module, or between the taking of a lock and the `try` that releases it. So from before the first large
import on no handler raises. While a daemon imports there is nothing to undo: a signal ends the process there and then.
From its first step on a signal is only noted. All steps are done in the main thread, one after the other, which looks
at the note between them and while it waits for others; when it serves, it does nothing but wait for the note.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
from contextlib import suppress

from splitnet.net import children
from splitnet.signals import ENDING, HANG_UP

_LOOK_S = 0.5
"""Windows runs no handler while the main thread waits for a lock, so it does not wait for longer."""


class StopSignals:
    """From its making on, no signal that ends a process raises.

    Until the first `check` they end the process at once. Then the first ends `check` and `wait`, the second all.
    """

    def __init__(self) -> None:
        self._number = 0
        self._may_end = True
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be filled by a handler
        for number in ENDING:
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raises SystemExit if one has come."""
        self._may_end = False
        if self._number:
            sys.exit(128 + self._number)

    def wait(self) -> None:
        """Returns when one has come; the next one raises KeyboardInterrupt. Raises SystemExit if it was SIGHUP."""
        if self._next() == HANG_UP:
            self.check()
        for number in ENDING:
            signal.signal(number, signal.default_int_handler)

    def _next(self) -> int:
        while True:
            with suppress(queue.Empty):
                return self._arrived.get(timeout=_LOOK_S)

    def _note(self, number: int, _frame: object) -> None:
        if self._may_end or self._number:
            children.kill_all()
            os._exit(128 + number)
        self._number = number
        self._arrived.put(number)
