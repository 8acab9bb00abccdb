"""Which peers have stored pages of keys and values, as the sessions of this client have seen."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from splitnet.wire.sent_log import PAGE

MOST_LABELS: Final = 1 << 18  # those used last


class StoredPages:
    """Peers by the label of a page, see `splitnet.wire.sent_log`. A peer may have dropped it since. Thread-safe."""

    def __init__(self) -> None:
        self._peers: OrderedDict[bytes, set[str]] = OrderedDict()
        self._lock = threading.Lock()
        self.generation = 0  # a part of the salt of labels: with another, no page of before is found
        self.codecs: set[str] = set()  # of the first link of sessions whose pages are known: labels depend on it

    def note(self, labels: Sequence[bytes], peer: str, pages: int, codec: str) -> None:
        """A peer has the first `pages` of a text, and no others of it."""
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
        """A hop has lied. What others have computed from its outputs, and stored, is not used any more."""
        with self._lock:
            self.generation = secrets.randbits(64)
            self._peers.clear()

    def positions(self, labels: Sequence[bytes]) -> dict[str, int]:
        """How many of the first positions of a text each peer has stored."""
        found: dict[str, int] = {}
        with self._lock:
            for index, label in enumerate(labels):
                for peer in self._peers.get(label, ()):
                    if found.get(peer, 0) == index * PAGE:
                        found[peer] = (index + 1) * PAGE
        return found
