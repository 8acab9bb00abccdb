"""The route of a session at this hop: the link to the next hop, and the messages to the next hop and the client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from peers.peer_links import NextHops, Outbox
from peers.sessions import HopSession, PassWork, Taps, Work
from scheduler.batching import DECODE_POSITIONS
from splitnet.limits import keep_latest
from splitnet.quant.device import to_host
from splitnet.wire.codecs import select_kept_positions
from splitnet.wire.endpoints import Connection, Endpoint, LinkState
from splitnet.wire.messages import Forward, Opened, Payload, Replay, Result, Step, Tapped, Timing

if TYPE_CHECKING:
    import torch

REMEMBERED_HOPS = 4096  # maximum number of remembered endpoints whose keys were proven
FAR_TIMES = 3.0  # a time limit may grow to this many times the usual limit: the client waits for the answer to `Open`


class _PendingOpen(NamedTuple):
    """An `Open` that waits for its next hop."""

    deadline: float
    new_link: bool  # the session has never used the link
    wants_pong: bool  # the link may lose messages although its state is up: only a pong proves that it works


class HopConnector:
    """Connects sessions to their next hops, and answers each `Open` when the outcome is known. A part of the service:
    callers hold its lock.

    reach_s: seconds in which a next hop must accept the link; else the client relays. held: see `Rows.held_positions`.
    """

    def __init__(
        self, outbox: Outbox, links: NextHops, reach_s: float, held: Callable[[HopSession], tuple[int, bool, bool]]
    ) -> None:
        self._outbox = outbox
        self._links = links
        self._reach_s = reach_s
        self._held = held
        self._pending: dict[HopSession, _PendingOpen] = {}
        self._proven: dict[Endpoint, None] = {}  # next hops that have proven their keys, the latest last

    def connect_next(self, session: HopSession, following: Endpoint | None, now: float, *, again: bool) -> None:
        """Connects a session to its next hop, and answers its `Open`, at once or later.

        again: a newer epoch of an open session.
        """
        pending = self._pending.pop(session, None)
        if following != session.next:
            pending = None
        new_link = following != session.next or (pending is not None and pending.new_link)
        if not self._set_next(session, following):
            self._send_opened(session, next_reachable=False)
            return
        state = LinkState.UP if following is None else self._outbox.link_state(following)
        # A route is opened again after a fault, and TCP detects a cut link late.
        wants_pong = again and not new_link and following is not None and state is LinkState.UP
        if wants_pong and following is not None:
            self._outbox.probe(following)
        proven = following in self._proven
        # A lost link comes back soon if the next hop only restarted; a new link gets the full time.
        limit_s = self._reach_s / 3 if (proven and state is LinkState.DOWN) or wants_pong else self._reach_s
        if following is not None:  # for an unproven next hop this peer's own network delay counts
            far_s = self._outbox.answer_limit_s(following, connects=not wants_pong)
            limit_s = max(limit_s, min(far_s, FAR_TIMES * self._reach_s))
        deadline = now + limit_s if pending is None else min(pending.deadline, now + limit_s)
        self._pending[session] = _PendingOpen(deadline, new_link, wants_pong)
        if _is_known(state, proven) and state is not LinkState.DOWN and not wants_pong:
            self._answer_open(session, reachable=state is LinkState.UP)

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state is LinkState.UP:
            keep_latest(self._proven, endpoint, None, REMEMBERED_HOPS)
        if _is_known(state, endpoint in self._proven):
            for session in [session for session in self._pending if session.next == endpoint]:
                self._answer_open(session, reachable=state is LinkState.UP)

    def opening_answered(self, endpoint: Endpoint) -> None:
        for session in [session for session, pending in self._pending.items() if pending.wants_pong]:
            if session.next == endpoint:
                self._answer_open(session, reachable=True)

    def tick(self, now: float) -> None:
        for session in [session for session, pending in self._pending.items() if now >= pending.deadline]:
            self._answer_open(session, reachable=False)
        self._links.tick(now)

    def end_opening(self, session: HopSession) -> None:
        self._pending.pop(session, None)
        self._set_next(session, None)

    def looked_up(self, session: HopSession) -> None:
        """The look-up of stored pages has ended."""
        route = session.route_state
        route.lookup_until = None
        if route.next_reachable is not None:
            self._send_opened(session, next_reachable=route.next_reachable)

    def _set_next(self, session: HopSession, following: Endpoint | None) -> bool:
        """Makes an endpoint, or none, the next hop of a session; False: this peer has too many links."""
        if following == session.next:
            return True
        before, session.next = session.next, None
        if following is not None and self._links.acquire(following):
            session.next = following
        if before is not None:
            self._links.release(before)
        return session.next == following

    def _answer_open(self, session: HopSession, *, reachable: bool) -> None:
        pending = self._pending.pop(session)
        if not reachable and pending.new_link:
            # The client relays, so the transport must stop trying to connect to this address.
            self._set_next(session, None)
        self._send_opened(session, next_reachable=reachable)

    def _send_opened(self, session: HopSession, *, next_reachable: bool) -> None:
        route = session.route_state
        route.next_reachable = next_reachable
        if route.lookup_until is None:
            cached, found, leaves_pages = self._held(session)
            facts = cached, route.weights, route.taps is not None, found, leaves_pages
            self._outbox.send(session.reply_to, Opened(session.id, session.epoch, next_reachable, *facts))


def _is_known(state: LinkState, proven: bool) -> bool:
    """Whether the state of a link says something about the next hop itself, not about another machine at its
    address."""
    return state in (LinkState.UP, LinkState.REFUSED) or (proven and state is not LinkState.CONNECTING)


def timing_of(work: Work | PassWork, outbox: Outbox) -> Timing:
    following = work.session.next
    rtt_ms = outbox.rtt_ms(following) if following is not None else 0.0
    return Timing(round(work.wait_ms * 1000), round(work.compute_ms * 1000), round(rtt_ms * 1000))


@dataclass(eq=False)
class HopOutputs:
    """What follows the last block of a session at this hop: selects, sends and logs the output of each pass.

    The engine and `Training` give it every output. At the tail it sends the client the positions that the client wants;
    elsewhere it sends all positions to the next hop, or to the client that relays them.
    """

    outbox: Outbox
    lock: threading.RLock  # of the service
    num_blocks: int  # of the model

    def wanted(self, work: Work, count: int, output: torch.Tensor) -> torch.Tensor:
        """The positions to send of a pass over the next `count` positions of a step; output: `[count, hidden]`."""
        return select_kept_positions(work.parts(count), output) if work.session.end == self.num_blocks else output

    def add_output(self, work: Work, values: torch.Tensor) -> None:
        """Takes in the wanted positions of one pass of a step, on the CPU. Raises CodecError: a value is not finite."""
        if len(values):
            work.outputs.append(work.session.codec.encode(values))

    def finish_step(self, work: Work) -> None:
        """Sends the output of a finished step, and logs it for a replay."""
        payload = work.outputs[0] if len(work.outputs) == 1 else b"".join(work.outputs)
        work.outputs = []
        with self.lock:
            session, step = work.session, work.step
            if session.closed:
                return
            # The output is sent first, because the next hop waits. In an older epoch it is only logged: the rows have
            # these
            # positions.
            if step.epoch == session.epoch:
                route = session.route_state
                route.last = max(route.last, 0 if step.replay_until else step.number)
                self._send_output(work, payload)
            if session.end != self.num_blocks:
                session.log.record_step(step.parts, step.forks, payload, step.rope_length, step.labels)

    def add_taps(self, work: Work, taps: Taps, states: Mapping[int, torch.Tensor]) -> None:
        """Takes in the hidden states of one pass of a step, by boundary. Sends the client all hidden states of a
        finished step."""
        for boundary, values in states.items():
            work.tapped.setdefault(boundary, []).append(taps.codec.encode(to_host(values)))
        with self.lock:
            session, step = work.session, work.step
            if work.remaining or session.closed or step.epoch != session.epoch:
                return
            for boundary, parts in work.tapped.items():
                payload = parts[0] if len(parts) == 1 else b"".join(parts)
                ids = session.id, step.epoch, step.number
                self.outbox.send(session.reply_to, Tapped(*ids, boundary, taps.codec.code, payload))

    def finish_pass(self, work: PassWork, message: Forward, payload: Payload) -> None:
        """Sends the encoded output of a forward pass. The caller holds the lock."""
        session, route = work.session, work.session.route_state
        route.last = max(route.last, message.number)
        code, end = session.codec.code, session.end
        timings = (*message.timings, timing_of(work, self.outbox))
        if session.next is not None:
            route.sent_on = True
            onward = replace(message, codec=code, payload=payload, boundary=end, timings=timings)
            self.outbox.send(session.next, onward)
        else:
            result = Result(session.id, message.epoch, message.number, end, code, timings, payload)
            self.outbox.send(session.reply_to, result)

    def replay_log(self, source: Connection, session: HopSession, message: Replay) -> None:
        """Sends the log of a session to its next hop; an empty log is a `Result` for `source`. The caller holds the
        lock."""
        assert session.next is not None
        steps, codec, route = list(session.log.replay(since=message.since)), session.log.codec, session.route_state
        if not steps:
            result = Result(session.id, session.epoch, message.number, message.until, session.codec.code, ())
            self.outbox.send(source, result)
        route.sent_on = True
        for index, (parts, payload, rope_length, labels) in enumerate(steps):
            number = message.number if index == len(steps) - 1 else 0
            # An empty list of forks drops rows of another text that the next hop may have.
            forks = None if index or message.since else ()
            again = session.id, session.epoch, number, parts, forks, message.until, codec, payload
            labels = labels if route.labelled else ()
            self.outbox.send(session.next, Step(*again, session.end, (), rope_length, labels))

    def are_under_way(self, session: HopSession) -> bool:
        """Whether messages to the next hop may still be on the link: no later ping was answered.

        A busy uplink delays prompts for minutes. These messages are not lost, and a repetition would delay them more.
        """
        following, route = session.next, session.route_state
        if following is None or self.outbox.link_state(following) is not LinkState.UP:
            return False
        if route.sent_on:
            route.sent_on, route.sent_before = False, self.outbox.probe(following)
        return self.outbox.answered(following) < route.sent_before

    def _send_output(self, work: Work, payload: Payload) -> None:
        session, step, route = work.session, work.step, work.session.route_state
        timing = timing_of(work, self.outbox)
        timings = (*step.timings, timing)
        if work.total <= DECODE_POSITIONS and not step.replay_until:
            route.timing = timing
        replayed = step.replay_until != 0 and session.end >= step.replay_until
        code = session.codec.code
        if session.next is not None and not replayed:
            route.sent_on = True
            kept = step.epoch, step.number, step.parts, step.forks, step.replay_until
            labels = step.labels if route.labelled else ()
            onward = Step(session.id, *kept, code, payload, session.end, timings, step.rope_length, labels)
            self.outbox.send(session.next, onward)
        elif not replayed or step.number:  # only the last step of a replay is answered
            body = b"" if replayed else payload
            result = Result(session.id, step.epoch, step.number, session.end, code, timings, body)
            self.outbox.send(session.reply_to, result)
