"""Opens links to peers to test whether and how they answer."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from scheduler.liveness import FIRST_TRIPS, MAX_ANSWER_S, TRIAL_ANSWER_S
from splitnet.directory.record import PeerRecord
from splitnet.errors import ProtocolError
from splitnet.nat.punch import PathKind
from splitnet.nat.tunnel import Tunnels
from splitnet.security.identity import Identity
from splitnet.transport.prober import Prober
from splitnet.transport.transport import Transport
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Destination, Endpoint, LinkState
from splitnet.wire.messages import SESSION_BYTES, Close, Failure, Message, Open, Opened, Payload, Pong, decode, encode

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class TriedPeer:
    """The answer of a peer. state: state of the link. rtt_ms: round trip; None: no answer. path_kind: how the peer is
    reached."""

    state: LinkState
    rtt_ms: float | None
    path_kind: PathKind = PathKind.DIRECT


class PeerLinks(AbstractContextManager["PeerLinks"]):
    """Links to peers for a short test; a context manager. identity: the key of the client. prober: pings peers."""

    def __init__(self, identity: Identity) -> None:
        self._changed = threading.Condition()
        self._opened: dict[bytes, Opened | Failure] = {}
        self._tunnels = Tunnels(identity)
        self._transport = Transport(
            identity,
            on_message=self._receive_message,
            on_link=lambda endpoint, state: self._notify(),
            tunnels=self._tunnels,
        )
        self.prober = Prober(self._send_open)
        self._transport.start()

    def __exit__(self, *_: object) -> None:
        self._transport.close()

    def try_out(self, endpoints: Collection[Endpoint]) -> dict[Endpoint, TriedPeer]:
        """Connects to all peers at once and pings them; takes a few seconds if a peer is silent."""
        first = {endpoint: self.prober.ping(endpoint) for endpoint in endpoints}

        def is_settled(endpoint: Endpoint) -> bool:
            state = self._transport.link_state(endpoint)
            return first[endpoint].done() or state is LinkState.DOWN or state.is_final

        self._wait_until_all(endpoints, is_settled, TRIAL_ANSWER_S)
        late = [each for each in endpoints if not is_settled(each) and self._transport.is_taken(each)]
        if late:  # peers with long round trips
            least_s = 0.0 if any(ping.done() for ping in first.values()) else MAX_ANSWER_S
            longest_s = max(self.prober.answer_limit_s(each, least_s, FIRST_TRIPS) for each in late)
            self._wait_until_all(late, is_settled, longest_s - TRIAL_ANSWER_S)
        answering = [endpoint for endpoint in endpoints if first[endpoint].done()]
        self.prober.answering(answering)  # the time of the first ping includes the handshake
        answers: dict[Endpoint, TriedPeer] = {}
        for each in endpoints:
            rtt_ms = self.prober.rtt_ms(each) if each in answering else None
            answers[each] = TriedPeer(self._transport.link_state(each), rtt_ms, self._tunnels.path_kind(each))
        return answers

    def ask_back(self, records: Sequence[PeerRecord], address: Endpoint) -> Mapping[str, bool]:
        """Asks answering peers to connect to an address, as to the next hop of a session.

        Returns:
            Whether each peer could connect, by the text of its key; peers without memory for a session are left out.
        """
        sessions = {record.key.text: secrets.token_bytes(SESSION_BYTES) for record in records}
        for record in records:
            asked = sessions[record.key.text], 1, record.model, record.start, record.end, 1, CODECS["none"].code
            self._send_open(record.endpoint, Open(*asked, b"", address.key.raw, address.address))
        waits_s = [self.prober.answer_limit_s(record.endpoint, TRIAL_ANSWER_S, FIRST_TRIPS) for record in records]
        self._wait_until_all(sessions.values(), lambda session: session in self._opened, max(waits_s, default=0.0))
        for record in records:
            self._send_open(record.endpoint, Close(sessions[record.key.text]))
        answers = {key: self._opened.pop(session, None) for key, session in sessions.items()}
        return {key: answer.next_reachable for key, answer in answers.items() if isinstance(answer, Opened)}

    def _send_open(self, endpoint: Endpoint, message: Message) -> None:
        self._transport.send(endpoint, encode(message))

    def _wait_until_all(self, things: Collection[Thing], condition: Callable[[Thing], bool], timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(map(condition, things)), timeout_s)

    def _receive_message(self, source: Destination, frames: Sequence[Payload]) -> None:
        try:
            message = decode(frames)
        except ProtocolError:
            return
        if isinstance(message, Pong) and isinstance(source, Endpoint):
            self.prober.pong(source, message)
        elif isinstance(message, Opened | Failure):
            self._opened[message.session] = message
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
