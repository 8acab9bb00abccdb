"""Connections of HTTP clients: time limits for what uvicorn waits for without end, and a bound on how many idle."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from splitnet.serve.shares import Holding, Shares, client_at

REQUEST_S = 10.0
"""Time for the head of a request, from the connection or from the last answer on."""

UNREAD_S = 30.0
"""A client that has not read `READ_BYTES` of what waits for it within this time is cut off."""
READ_BYTES = 2**14

IDLE_CONNECTIONS = 256
"""Connections without a whole request, at most; the oldest of the client with most of them are closed."""


class Connection(H11Protocol):
    """uvicorn's, which bounds neither the time for a head nor the time for reading an answer.

    Args:
        idle: all connections without a whole request.
    """

    def __init__(self, idle: Shares, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all_idle = idle
        self._idle: Holding | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait(REQUEST_S)
        self._be_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self._be_busy()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:
            if not self.flow.write_paused:
                self._wait(None)
            if not self.cycle.more_body:
                self._be_busy()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._wait(UNREAD_S if self.flow.write_paused else REQUEST_S)
            self._be_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(UNREAD_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait(None if self._answering else REQUEST_S)

    @property
    def _answering(self) -> bool:
        # Before its first request a connection of uvicorn has none.
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _wait(self, seconds: float | None) -> None:
        """Cuts the client off after so long if it does nothing; None: waits without end."""
        if self._timer is not None:
            self._timer.cancel()
        self._unread = self.transport.get_write_buffer_size()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        if self.transport.get_write_buffer_size() <= self._unread - READ_BYTES:
            self._wait(UNREAD_S)
        else:
            self.transport.abort()

    def _be_idle(self) -> None:
        if self._idle is None and not self.transport.is_closing():
            self._idle = self._all_idle.hold(client_at(self.client[0] if self.client else ""), self.transport.abort)
            self._idle.grow(1)

    def _be_busy(self) -> None:
        if self._idle is not None:
            self._idle.release()
            self._idle = None
