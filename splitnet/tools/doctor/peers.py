"""Each peer of a swarm: whether it is there, is who its record says, and speaks the same protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from splitnet.directory.record import PeerRecord
from splitnet.errors import AddressInUse, SplitnetError
from splitnet.nat.port_mapping import MappingError, look_for_router
from splitnet.nat.punch import Way
from splitnet.security.identity import Identity
from splitnet.swarm.links import refusal
from splitnet.swarm.trial import PeerAnswer, PeerLinks
from splitnet.tools.doctor.finding import Finding, Status, failed, passed, warned
from splitnet.transport.addresses import is_reachable, public_address, refuse_taken
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Endpoint, LinkState, is_address
from splitnet.wire.messages import PROTOCOL_VERSION

_SHOWN_KEY = 9
_HIDDEN_SILENCE = (
    "it is not reached through any of its helpers: it or they have ended, or have no room; its record expires within a "
    "minute, or names others then"
)


def peer(record: PeerRecord, answer: PeerAnswer, ahead_s: float, allowed_s: float) -> Finding:
    """What there is to say of one peer.

    Args:
        record: what it announces.
        answer: how it answers.
        ahead_s: how much later than now its record was signed, in seconds; negative for one of the past.
        allowed_s: by how many seconds clocks may differ.
    """
    blocks = f"blocks {record.start}..{record.end - 1}"
    name = f"{record.key.text[:_SHOWN_KEY]} at {record.address}, {blocks}"
    if record.relays:
        name = f"{record.key.text[:_SHOWN_KEY]} behind a router, {blocks}"
    if record.protocol != PROTOCOL_VERSION:
        older = "this machine" if record.protocol > PROTOCOL_VERSION else "it"
        return failed("peer", f"{name}: speaks protocol {record.protocol}, this is {PROTOCOL_VERSION}: upgrade {older}")
    if answer.state.is_final:
        return failed("peer", f"{name}: {refusal(Endpoint(record.address, record.key), answer.state)}")
    if answer.rtt_ms is None:
        return warned("peer", f"{name}: {_HIDDEN_SILENCE if record.relays else _silence(answer.state)}")
    if ahead_s > allowed_s:
        return warned("peer", f"{name}: its clock is {ahead_s:.0f} s ahead: have it set by NTP")
    way = "" if answer.way is Way.DIRECT else f", {answer.way.value}"
    return passed("peer", f"{name}: answers in {answer.rtt_ms:.1f} ms, with its key{way}")


def peer_to_join(address: str, endpoint: Endpoint, answer: PeerAnswer, wrong: Callable[[str, str], Finding]) -> Finding:
    """Whether a peer to join through answers, with the key that its address names.

    Args:
        wrong: makes a finding of what is not as it should be.
    """
    if answer.state is LinkState.WRONG_KEY:
        return wrong("join", f"{address}: what answers there has another key: copy the address that it prints now")
    if answer.state is LinkState.REFUSED:
        return wrong("join", f"{address}: {refusal(endpoint, answer.state)}")
    if answer.rtt_ms is None:
        return wrong("join", f"{address}: {_silence(answer.state)}")
    return passed("join", f"{address} answers in {answer.rtt_ms:.1f} ms, with its key")


def _silence(state: LinkState) -> str:
    if state is LinkState.DOWN:
        return (
            "nothing listens there: it has ended and its record expires within a minute, or it announces a wrong "
            "address: start it with --public-host"
        )
    if state is LinkState.UP:
        return "accepts the connection and does not answer: it hangs; start it again"
    return (
        "the connection gets no answer: have its port opened in firewalls and routers on the way, or start it with "
        "the --public-host by which others reach it"
    )


ASKED_PEERS = 3


class Reach:
    """The checks of one address.

    Args:
        identity: the key of this machine.
        listen: `tcp://host:port`, where a peer would listen.
        public_host: `HOST` or `HOST:PORT` by which others reach it; None: found out.
        needed: this machine is meant to serve, so that it is a fault if nobody reaches it.
    """

    def __init__(self, identity: Identity, listen: str, public_host: str | None, *, needed: bool) -> None:
        self._identity = identity
        self._listen = listen
        self._public_host = public_host
        self._needed = needed
        self._serving: PeerRecord | None = None
        self._address = listen
        """What others were asked to connect to."""

    def port(self, own: PeerRecord | None = None) -> Finding:
        """Whether the port is free.

        Args:
            own: the record of a peer with the key of this machine, which may hold the port rightly.
        """
        try:
            refuse_taken(self._listen)
        except AddressInUse as error:
            if own is not None:
                self._serving = own
                return passed("port", f"{self._listen} is taken by the peer that has the key of this machine")
            return failed("port", str(error))
        except SplitnetError as error:
            return failed("port", str(error))
        return passed("port", f"{self._listen} can be listened on")

    def from_outside(self, links: PeerLinks, answering: Sequence[PeerRecord]) -> Finding:
        """Whether some of the peers that answer reach this machine; to be called after `port`, if that passed."""
        if self._serving is not None:
            return self._ask(links, answering, self._serving.address)
        try:
            listener = Transport(self._identity, on_message=lambda *_: None, listen=self._listen)
        except SplitnetError as error:
            return failed("reach", str(error))
        listener.start()
        try:
            address = public_address(self._listen, listener.port, self._public_host)
        except SplitnetError as error:
            return failed("reach", str(error))
        else:
            return self._ask(links, answering, address)
        finally:
            listener.close()

    def router(self, found: Finding) -> Iterator[Finding]:
        """What the router says of itself, if `from_outside` has found that no peer reaches this machine.

        It is asked for no port.
        """
        if found.status is Status.passed or self._public_host is not None or not is_reachable(self._address):
            return
        try:
            yield passed("router", f"{look_for_router()} gives ports, and a peer here asks it for one")
        except MappingError as error:
            yield warned("router", f"it gives no ports ({error}): switch NAT-PMP or UPnP on there, or forward a port")

    def _ask(self, links: PeerLinks, answering: Sequence[PeerRecord], address: str) -> Finding:
        self._address = address
        wrong = failed if self._needed else warned
        if not is_address(address):
            return failed("reach", f"peers cannot connect to {address}: give --public-host as HOST or HOST:PORT")
        others = [record for record in answering if record.key != self._identity.public][:ASKED_PEERS]
        if not others:
            return warned("reach", "there is no peer that answers and could try to reach this machine: see above")
        here = Endpoint(address, self._identity.public)
        reached = dict(links.ask_back(others, here))
        # A peer that remembers this address from before waits a while until it tries again, but a new link at once.
        again = [record for record in others if reached.get(record.key.text) is False]
        reached |= links.ask_back(again, here) if again else {}
        count = sum(reached.values())
        if not reached:
            return warned("reach", f"no peer had room to try whether it reaches {address}: try again later")
        if count == len(reached):
            note = ", which is only for this machine" if not is_reachable(address) else ""
            return passed("reach", f"{count} of {count} peers reach this machine at {address}{note}")
        who = f"only {count} of {len(reached)} peers reach" if count else "no peer reaches"
        helpers = sum(record.helper is not None for record in answering)
        if helpers and not count:
            return warned(
                "reach",
                f"{who} this machine at {address}: a peer here is reached through helpers ({helpers} peers help); "
                "straighter is to open the port, forward it in the router, and name it with --public-host",
            )
        purpose = "" if self._needed else "a client needs no open port, but to serve here "
        return wrong(
            "reach",
            f"{who} this machine at {address}: {purpose}open the port in firewalls, forward it in the router, and name "
            "with --public-host the HOST:PORT that others see",
        )
