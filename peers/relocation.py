"""When a peer looks whether other blocks need it more, and that it does so soon when others are lost."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from peers.holder_watch import MAX_WATCHED, HolderWatch
from peers.mover import Mover
from splitnet.errors import SplitnetError
from splitnet.net.identity import PublicKey
from splitnet.net.records import PeerRecord

log = logging.getLogger(__name__)

LOOK_S = 15.0
"""How often a peer looks at the records of all others, at most."""

QUICK_LOOK_S = 2.0
LOOK_PER_PEER_S = 0.3
"""In small swarms it looks more often: a hole is filled the sooner, and a lookup there costs little."""

URGENT_LOOK_S = 1.0
URGENT_LOOK_PER_PEER_S = 0.05
"""While blocks are served by nobody: whoever is to move then waits for the records of others."""

CHECK_S = 0.5
"""How often it checks whether the peers that it watches are there."""

Blocks = tuple[int, int]


class Relocation:
    """Looks at the swarm from time to time, and moves the peer where it is needed more. Thread-safe.

    For peers that may move; others need not look.

    Args:
        mover: decides.
        watch: tells which peers are gone although their records are still there.
        leaving: set when the peer ends.
        own: the record of this peer as of now.
        others: looks all other records up.
        publish: announces this peer's record beside the regular refreshes.
        move: makes the peer serve other blocks; in haste if it is told so, as some are served by nobody.
    """

    def __init__(
        self,
        mover: Mover,
        watch: HolderWatch,
        leaving: threading.Event,
        *,
        own: Callable[[], PeerRecord],
        others: Callable[[], Sequence[PeerRecord]],
        publish: Callable[[], None],
        move: Callable[[Blocks, bool], None],
    ) -> None:
        self._mover = mover
        self._watch = watch
        self._leaving = leaving
        self._own = own
        self._others = others
        self._publish = publish
        self._move = move
        self._gone: frozenset[PublicKey] = frozenset()
        self._issued: dict[PublicKey, float] = {}
        """Of the records of those that are gone: when they had been, as of the loss."""
        self._heard_of: set[tuple[PublicKey, Blocks]] = set()
        """Moves of others that were announced."""
        self._pause_s = QUICK_LOOK_S
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look_often, name="splitnet-place", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Waits until the thread has ended, which it does when the peer leaves."""
        if self._thread.ident is not None:
            self._thread.join()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The peer does not begin to move meanwhile; waits for a move that is under way."""
        with self._lock:
            yield

    def reconsider(self) -> bool:
        """Moves to other blocks if the swarm needs this peer there more; tells whether it has moved."""
        with self._lock:
            if self._leaving.is_set():
                return False
            before, own, others = self._mover.intended, self._own(), self._others()
            now = time.time()
            present = self._present(others)
            span = self._mover.decide(own, present, now)
            if span is not None:
                self._move(span, self._mover.lacking)
                return True
            lost = [record for record in others if record.key in self._gone]
            # Where they are few everybody watches everybody: who is to move may be lost with those it was to replace.
            rest = others if len(others) <= MAX_WATCHED else ()
            self._watch.watch([*lost, *self._mover.guarded(own, present, now), *rest])
            announced = {(record.key, record.moving_to) for record in others if record.moving_to and record.serves}
            # Who announces a move waits until it has heard of others.
            if self._mover.intended != before or announced - self._heard_of:
                self._publish()
            self._pause_s = self._pause(len(others))
            self._heard_of = announced
            return False

    def _pause(self, others: int) -> float:
        if self._mover.lacking:
            return min(LOOK_S, max(URGENT_LOOK_S, URGENT_LOOK_PER_PEER_S * others))
        return min(LOOK_S, max(QUICK_LOOK_S, LOOK_PER_PEER_S * others))

    def _present(self, others: Sequence[PeerRecord]) -> list[PeerRecord]:
        """Those that are there, as far as is known here; a record that is renewed shows that its peer is."""
        self._gone = self._watch.gone(time.monotonic())
        self._issued = {
            record.key: self._issued.get(record.key, record.issued_at) for record in others if record.key in self._gone
        }
        return [record for record in others if record.issued_at > self._issued.get(record.key, 0.0)]

    def _look_often(self) -> None:
        look_at = time.monotonic() + QUICK_LOOK_S
        while not self._leaving.wait(CHECK_S):
            if time.monotonic() < look_at and self._watch.gone(time.monotonic()) == self._gone:
                continue
            try:
                self.reconsider()
            except SplitnetError as error:
                log.warning("could not look for better blocks to serve: %s", error)
            # Not at the same moment as everybody else: who looks later sees what the others have announced.
            look_at = time.monotonic() + self._pause_s * random.uniform(0.5, 1.5)
