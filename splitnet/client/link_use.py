"""What a decode token costs on each link of an open route."""

from __future__ import annotations

from dataclasses import dataclass

from splitnet.client.session_state import SessionState
from splitnet.net.codecs import Codec
from splitnet.net.messages import Part, Result, Step, Timing, encode

_POSITION = 1000
_TIMING = Timing(500, 10_000, 500)
"""The size of a message grows a little with the numbers in it; these stand for usual ones."""


@dataclass(frozen=True, slots=True)
class LinkUse:
    """A link of a route."""

    sender: str
    receiver: str
    codec: str
    bytes_per_token: int
    """Of the message of one decode token, without the framing and encryption of ZeroMQ."""


def link_uses(state: SessionState) -> list[LinkUse]:
    """The links of a session's route from the client back to it."""
    uses: list[LinkUse] = []
    codec, sender = state.first_codec, "client"
    hops = list(state.hops)
    for index, hop in enumerate(hops):
        start, end = hop.blocks
        receiver = f"blocks {start}..{end - 1}"
        uses.append(LinkUse(sender, receiver, codec.name, _step_bytes(state, codec, index)))
        sender = f"{receiver} via client" if hop.relayed else receiver
        codec = hop.codec
    if hops:
        uses.append(LinkUse(sender, "client", codec.name, _result_bytes(state, codec, len(hops))))
    return uses


def _step_bytes(state: SessionState, codec: Codec, hops_before: int) -> int:
    payload = bytes(codec.bytes_per_position(state.hidden_size))
    parts = (Part(1, _POSITION, 1, 1),)
    timings = (_TIMING,) * hops_before
    step = Step(state.session, state.epoch, _POSITION, parts, None, 0, codec.code, payload, 0, timings)
    return sum(map(len, encode(step)))


def _result_bytes(state: SessionState, codec: Codec, hops: int) -> int:
    payload = bytes(codec.bytes_per_position(state.hidden_size))
    result = Result(state.session, state.epoch, _POSITION, state.blocks[1], codec.code, (_TIMING,) * hops, payload)
    return sum(map(len, encode(result)))
