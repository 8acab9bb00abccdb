"""A peer joins its swarm, or starts one, while it loads its blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from peers.lan_presence import LanPresence
from peers.options import PeerOptions
from splitnet.errors import DirectoryError
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.addresses import dht_address
from splitnet.net.dht_node import import_hivemind
from splitnet.net.directory import Directory

FILE_TIMEOUT_S = 180.0
"""How long the file with the address of the first peer is waited for."""


class Joining:
    """Joins in a thread of its own, from when it is made; end it with `result` or `give_up`.

    Args:
        options: how to join.
        checkpoint: the model.
        report: told what is found on the local network, see `Peer.start`.
    """

    def __init__(self, options: PeerOptions, checkpoint: Checkpoint, report: Callable[[str, int, int], None]) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._report = report
        self._given_up = threading.Event()
        self._joined: Future[tuple[Directory, LanPresence | None]] = Future()
        threading.Thread(target=self._run, name="splitnet-joining", daemon=True).start()

    def check(self) -> None:
        """Raises what it has failed with, if it has."""
        if self._joined.done():
            self._joined.result()

    def result(self) -> tuple[Directory, LanPresence | None]:
        """Waits for it. Raises DirectoryError or AddressInUse, see `Directory.start`."""
        return self._joined.result()

    def give_up(self) -> None:
        """Leaves as soon as it has joined, which is waited for. Does nothing if it has failed."""
        self._given_up.set()
        if self._joined.exception() is None:
            directory, lan = self._joined.result()
            if lan is not None:
                lan.close()
            directory.close()

    def _run(self) -> None:
        try:
            self._joined.set_result(self._join())
        except BaseException as error:
            self._joined.set_exception(error)

    def _join(self) -> tuple[Directory, LanPresence | None]:
        options = self._options
        initial_peers = list(options.initial_peers)
        import_hivemind()
        if options.join_file is not None:
            initial_peers.append(self._read_when_there(options.join_file))
        listen = options.dht_listen if options.dht_listen is not None else (dht_address(options.listen),)
        directory = Directory.start(initial_peers=initial_peers, listen=listen)
        if not options.lan:
            return directory, None
        try:
            has_joined = bool(initial_peers)
            return directory, LanPresence.start(directory, self._checkpoint, has_joined=has_joined, report=self._report)
        except BaseException:
            directory.close()
            raise

    def _read_when_there(self, file: Path) -> str:
        deadline = time.monotonic() + FILE_TIMEOUT_S
        while not file.exists():
            if self._given_up.wait(0.05) or time.monotonic() > deadline:
                raise DirectoryError(f"no peer has written its address to {file} in {FILE_TIMEOUT_S:.0f} s")
        return file.read_text().strip()
