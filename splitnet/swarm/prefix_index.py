"""An index of the peers that have stored pages of keys and values, filled by the sessions of this client."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from splitnet.wire.sent_log import PAGE

MOST_LABELS: Final = 1 << 18  # largest number of entries of the index; the least recently used are dropped first


class PrefixIndex:
    """Peers by the label of a page, see `splitnet.wire.sent_log`. A peer may have dropped the page since. Thread-safe.

    Attributes:
        generation: part of the salt of labels. A new generation finds no page that an earlier one stored.
        codecs: names of the codecs of the first link, on which labels depend, of all sessions with indexed pages.
    """

    def __init__(self) -> None:
        self._peers: OrderedDict[bytes, set[str]] = OrderedDict()
        self._lock = threading.Lock()
        self.generation = 0
        self.codecs: set[str] = set()

    def note(self, labels: Sequence[bytes], peer: str, pages: int, codec: str) -> None:
        """Notes that a peer has stored exactly the first `pages` pages of a text."""
        with self._lock:
            self.codecs.add(codec)
            for index, label in enumerate(labels):
                if index < pages:
                    self._peers.setdefault(label, set()).add(peer)
                    self._peers.move_to_end(label)
                elif label in self._peers:
                    self._peers[label].discard(peer)
            while len(self._peers) > MOST_LABELS:
                self._peers.popitem(last=False)

    def distrust(self) -> None:
        """Gives up all stored pages after a hop has lied: other peers may have computed pages from its outputs."""
        with self._lock:
            self.generation = secrets.randbits(64)
            self._peers.clear()

    def positions(self, labels: Sequence[bytes]) -> dict[str, int]:
        """Number of first positions of a text that each peer has stored, by the peer's name."""
        found: dict[str, int] = {}
        with self._lock:
            for index, label in enumerate(labels):
                for peer in self._peers.get(label, ()):
                    if found.get(peer, 0) == index * PAGE:
                        found[peer] = (index + 1) * PAGE
        return found
