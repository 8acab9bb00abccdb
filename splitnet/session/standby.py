"""Copies a session's keys and values to replicas in the background. A replica that replaces a dead hop computes only
positions that were not copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from splitnet.errors import SplitnetError
from splitnet.session.failover import RouteHop
from splitnet.session.prefix_lookup import copy_request
from splitnet.swarm.plan import Needs, PlannedHop
from splitnet.swarm.swarm import Swarm
from splitnet.wire.messages import MAX_LABELS, CopiedPages

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # interval at which hops are compared with their replicas
ASK_AGAIN_S: Final = 15.0  # time after which a replica without an answer is asked again
PLAN_S: Final = 30.0  # interval at which the replica of a hop is planned again
PAGES_AT_ONCE: Final = 128  # largest number of pages of one request: bounds the loss if the replica dies


@dataclass(slots=True)
class _ReplicaState:
    """The pages at the replica of a hop. replica: None: no peer can replace the hop."""

    replica: PlannedHop | None
    planned_at: float
    pages: int = 0
    last: bytes = b""  # label of the last page
    stuck: bool = False  # the last request has copied no page
    number: int = 0  # number of the open request; 0: there is none
    asked_at: float = 0.0
    asked: tuple[bytes, ...] = ()  # labels of the request


@dataclass(frozen=True, slots=True)
class StandbyText:
    """The present route of a session, and the labels of its text's pages."""

    hops: Sequence[RouteHop]
    labels: tuple[bytes, ...]
    needs: Needs
    codec: str  # of the first link


class Standby:
    """Asks replicas to copy the pages of each hop, at `rate` bytes per second in total. Must be closed.

    present: returns the present route; None: there is nothing to copy. Called from the thread of this object.
    """

    def __init__(
        self,
        swarm: Swarm,
        session: bytes,
        rate: float,
        present: Callable[[], StandbyText | None],
        number: Callable[[], int],
    ) -> None:
        self.copied_bytes = 0
        self._swarm = swarm
        self._session = session
        self._rate = rate
        self._present = present
        self._number = number
        self._copies: dict[str, _ReplicaState] = {}  # by the name of the hop
        self._lock = threading.Lock()
        self._closed = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run_thread, name="splitnet-standby", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread without waiting. Any thread may call this."""
        self._closed = True
        self._changed.set()

    def received(self, message: CopiedPages) -> bool:
        """Handles the answer of a replica; False: the message answers another request."""
        with self._lock:
            for copy in self._copies.values():
                if copy.number == message.number:
                    copy.number, copy.stuck = 0, message.pages <= copy.pages
                    copy.pages = min(message.pages, len(copy.asked))
                    copy.last = copy.asked[copy.pages - 1] if copy.pages else b""
                    self.copied_bytes += message.nbytes
                    self._changed.set()
                    return True
        return False

    def _run_thread(self) -> None:
        while not self._closed:
            self._changed.wait(LOOK_S)
            self._changed.clear()
            try:
                present = self._present()
                if present is not None:
                    self._update_replicas(present)
            except SplitnetError as error:
                log.debug("no standby: %s", error)
            except Exception:
                log.exception("the standby of a session failed")
                return

    def _update_replicas(self, present: StandbyText) -> None:
        now, labels = time.monotonic(), present.labels[:MAX_LABELS]
        names, behind = {hop.name for hop in present.hops}, list[tuple[RouteHop, _ReplicaState, PlannedHop]]()
        self._copies = {name: copy for name, copy in self._copies.items() if name in names}
        for index, hop in enumerate(present.hops):
            copy = self._copies.get(hop.name)
            if copy is None or (now - copy.planned_at > PLAN_S and not copy.number):
                replica = self._replica(present, index)
                if copy is None or copy.replica is None or replica is None or replica.name != copy.replica.name:
                    copy = _ReplicaState(replica, now)
                copy.planned_at = now
                with self._lock:
                    self._copies[hop.name] = copy
            replica = copy.replica
            if copy.last not in labels[copy.pages - 1 : copy.pages]:  # the replica holds pages of another text
                copy.pages, copy.last = 0, b""
            if replica is not None and hop.context and copy.pages < len(labels):
                behind.append((hop, copy, replica))
        for hop, copy, replica in behind:
            if copy.pages:
                self._swarm.prefix_index.note(labels, replica.name, copy.pages, present.codec)
            if (copy.number or copy.stuck) and now - copy.asked_at < ASK_AGAIN_S:
                continue
            with self._lock:
                copy.number, copy.asked_at = self._number(), now
                copy.asked = labels[: copy.pages + PAGES_AT_ONCE]
            rate = max(1.0, self._rate / len(behind))
            message = copy_request(hop, self._session, copy.number, hop.endpoint, copy.asked, rate=rate)
            self._swarm.links.send(replica.record.endpoint, message)

    def _replica(self, present: StandbyText, index: int) -> PlannedHop | None:
        """The peer that a repair would choose for a hop, if one peer holds all its blocks in the same format."""
        hops = present.hops
        before = hops[index - 1].planned.record if index else None
        behind = hops[index + 1].planned.record if index + 1 < len(hops) else None
        try:
            route = self._swarm.plan_route(
                present.needs,
                blocks=hops[index].blocks,
                neighbours=(before, behind),
                exclude={hop.name for hop in hops},
            )
        except SplitnetError:
            return None
        return route[0] if len(route) == 1 and route[0].record.dtype == hops[index].weights else None
