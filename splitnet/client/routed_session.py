"""What every kind of session has: a route that is opened, repaired and closed, and waiting for what comes back."""

from __future__ import annotations

import logging
import queue
import secrets
import time

from splitnet.client.chain import Chain, Hop, Traffic
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.overview import short_key
from splitnet.client.planner import Needs
from splitnet.client.recovery import COVERAGE_POLL_S, Recovered, Recovery
from splitnet.client.swarm import Swarm
from splitnet.errors import CoverageError, PeerBusy, PeerLost, SplitnetError
from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import SESSION_BYTES, Message
from splitnet.net.sent_log import SentLog

log = logging.getLogger(__name__)

RECOVERY_TIMEOUT_S = 30.0


class RoutedSession:
    """A session along a route of peers. One thread uses a session at a time.

    When a hop dies, the session replaces it and goes on; see `splitnet.client.recovery`.

    Args:
        swarm: the peers.
        budget: positions of KV cache to reserve over all rows.
        codecs: chooses the codec of each link.
        blocks: what the peers run of the model, `[start, end)`; None: all of it.
        in_flight: how many steps are under way at the same time.
        step_timeout_s: how long an answer may take in all.
        recovery_timeout_s: how long to wait for other peers when blocks of the route are served by nobody any more.

    Attributes:
        recoveries: repairs of the route so far.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        budget: int,
        codecs: LinkCodecs,
        blocks: tuple[int, int] | None,
        in_flight: int,
        step_timeout_s: float,
        recovery_timeout_s: float,
    ) -> None:
        self.recoveries: list[Recovered] = []
        self.id = secrets.token_bytes(SESSION_BYTES)
        self._swarm = swarm
        self._chain = Chain(swarm, self.id, codecs, blocks or (0, swarm.facts.num_blocks))
        self._budget = max(1, budget)
        self._in_flight = in_flight
        self._step_timeout_s = step_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._number = 0
        self._log: SentLog | None = None
        self._is_open = False
        swarm.register(self)

    @property
    def hops(self) -> list[Hop]:
        """The open route; empty before the first step."""
        return self._chain.hops if self._is_open else []

    @property
    def traffic(self) -> Traffic:
        return self._chain.traffic

    def open(self, prompt: int = 0) -> None:
        """Plans a route and reserves memory on it; called by the first step at the latest.

        Args:
            prompt: positions of the first step; with them the route is chosen for the time to the first token, too.

        Raises:
            CoverageError: blocks are served by nobody; if they once were, nor after `recovery_timeout_s`.
            PeerBusy: no peer of some blocks has memory for the budget.
            NotAuthorized: the peers do not accept this client's key.
            PeerLost: peers do not answer, nor does anybody take their place in time.
            SessionClosed: another thread has closed the session.
        """
        self._chain.refuse_if_closed()
        refused: dict[str, SplitnetError] = {}
        deadline = time.monotonic() + self._recovery_timeout_s
        was_covered = self._swarm.was_covered
        while not self._is_open:
            self._chain.refuse_if_closed()
            try:
                route = self._swarm.plan(self._needs(prompt), exclude=refused, fresh=bool(refused))
            except (CoverageError, PeerBusy):
                silent = [name for name, error in refused.items() if isinstance(error, PeerLost)]
                may_come_back = len(silent) == len(refused) and (silent or was_covered)
                if may_come_back and time.monotonic() < deadline:
                    # Peers have died, and others will take their blocks; or the network is back in a moment.
                    for name in silent:
                        del refused[name]
                    time.sleep(COVERAGE_POLL_S)
                    self._swarm.pardon_living()
                    continue
                present = {record.key.text for record in self._swarm.peers()}
                for name in reversed(refused):
                    if name in present:
                        # Why a peer that is there refused says more than that nobody else is.
                        raise refused[name] from None
                raise
            failed = self._chain.open(route, self._budget)
            for name, error in failed.items():
                log.info("peer %s is left out: %s", name, error, extra={"session": self.id.hex(), "peer": name})
                self._swarm.events.note("refused", f"{short_key(name)} is left out of a new route: {error}")
            refused.update(failed)
            self._is_open = not failed

    @property
    def needs(self) -> Needs:
        """What the session wants of its route once it decodes."""
        return self._needs(0)

    def close(self) -> None:
        """Frees the memory on all hops; from any thread.

        A thread that uses the session gets `SessionClosed`, and closes it again: it may have been opening hops.
        """
        self._swarm.unregister(self)
        self._chain.close()

    def close_later(self) -> None:
        """Has another thread do so within a second; the only way for finalizers, see `Swarm.close_later`."""
        self._swarm.close_later(self)

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Takes a message from the transport's thread."""
        self._chain.deliver(source, message)

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Takes from the transport's thread that a link of the client is lost or refused."""
        self._chain.link_failed(endpoint, error)

    def _needs(self, prompt: int) -> Needs:
        return self._chain.needs(self._budget, self._in_flight, prompt)

    def _recovery(self) -> Recovery:
        return Recovery(self._swarm, self._chain, self._log, self._next_number, self._recovery_timeout_s)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _await(self, deadline: float, patience_s: float, recovery: Recovery) -> None:
        """Waits for one event; a hop that is lost is replaced."""
        if time.monotonic() >= deadline:
            route = " -> ".join(f"{start}:{end}" for start, end in (hop.blocks for hop in self.hops))
            raise PeerLost(f"no answer from the route {route} in {self._step_timeout_s:.0f} s: try again")
        try:
            trouble = self._chain.receive(min(patience_s, deadline - time.monotonic()))
        except queue.Empty:
            recovery.find_silent_hops(self.needs)
            return
        if trouble is not None:
            recovery.replace_hop(*trouble, self.needs)
