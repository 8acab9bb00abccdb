"""Proxies that emulate a network: they delay the bytes of TCP connections to a peer, hold them back, or cut the
connections."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Proxy:
    """Listens on its own port, and passes bytes on to `target`, the port of a peer on loopback.

    Attributes:
        port: the port at which the proxy listens.
        target: the port of the peer, which may be set later.
        delay_s: the delay in each direction, in seconds.
        bytes_per_s: the maximum rate of each connection and direction.
        late_bytes: number of bytes that have passed since the last release.
    """

    def __init__(self) -> None:
        self.target = 0
        self.delay_s = 0.0
        self.bytes_per_s = math.inf
        self.late_bytes = 0
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._refuses = False
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def hold(self) -> None:
        """Stops passing bytes on, without an error at either end, as if the network had stopped."""
        self.late_bytes = 0
        self._call(self._set(open=False))

    def release(self) -> None:
        """Passes on the bytes that were held back, and later ones."""
        self._call(self._set(open=True))

    def cut(self) -> None:
        """Ends all connections and refuses new ones, until `mend`."""
        self._call(self._cut())

    def mend(self) -> None:
        """Accepts connections again, and passes on all bytes without delay."""
        self._refuses = False
        self.delay_s = 0.0
        self.bytes_per_s = math.inf
        self.release()

    def close(self) -> None:
        self._server.close()
        self._call(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _set(self, *, open: bool) -> None:
        if open:
            self._open.set()
        else:
            self._open.clear()

    async def _cut(self) -> None:
        self._refuses = True
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, onward_writer}
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.ensure_future(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.ensure_future(self._send(line, sink))
        try:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    line.put_nowait((self._loop.time() + self.delay_s, data))
            line.put_nowait((0.0, b""))
            await sending
        finally:
            sending.cancel()
            self._writers.discard(sink)
            sink.close()

    async def _send(self, line: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            due, data = await line.get()
            if not data:
                return
            await asyncio.sleep(due - self._loop.time())
            if not self._open.is_set():
                await self._open.wait()
                self.late_bytes += len(data)
            if len(data) > self.bytes_per_s / 10:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            sink.write(data)


@contextmanager
def proxies(count: int) -> Iterator[list[Proxy]]:
    """`count` proxies, which end with the block."""
    made = [Proxy() for _ in range(count)]
    try:
        yield made
    finally:
        for proxy in made:
            proxy.close()
