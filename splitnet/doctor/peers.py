"""Each peer of a swarm: whether it is there, is who its record says, and speaks the same protocol."""

from __future__ import annotations

from collections.abc import Callable

from splitnet.doctor.finding import Finding, failed, passed, warned
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.links import refusal
from splitnet.net.messages import PROTOCOL_VERSION
from splitnet.net.peer_links import PeerAnswer
from splitnet.net.records import PeerRecord
from splitnet.net.ways.punching import Way

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
