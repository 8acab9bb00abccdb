"""What a decode token costs on each link of an open route."""

from __future__ import annotations

from dataclasses import dataclass

from splitnet.client.chain import Chain
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


def link_uses(chain: Chain, hidden: int) -> list[LinkUse]:
    """The links of a route from the client back to it, for a model of this hidden size."""
    uses: list[LinkUse] = []
    codec, sender = chain.first_codec, "client"
    for index, hop in enumerate(chain.hops):
        start, end = hop.blocks
        receiver = f"blocks {start}..{end - 1}"
        uses.append(LinkUse(sender, receiver, codec.name, _step_bytes(chain, codec, hidden, index)))
        sender = f"{receiver} via client" if hop.carried else receiver
        codec = hop.codec
    if chain.hops:
        uses.append(LinkUse(sender, "client", codec.name, _result_bytes(chain, codec, hidden)))
    return uses


def _step_bytes(chain: Chain, codec: Codec, hidden: int, hops_before: int) -> int:
    payload = bytes(codec.bytes_per_position(hidden))
    parts = (Part(1, _POSITION, 1, 1),)
    timings = (_TIMING,) * hops_before
    step = Step(chain.session, chain.epoch, _POSITION, parts, None, 0, codec.code, payload, 0, timings)
    return sum(map(len, encode(step)))


def _result_bytes(chain: Chain, codec: Codec, hidden: int) -> int:
    payload = bytes(codec.bytes_per_position(hidden))
    end = chain.hops[-1].planned.end
    timings = (_TIMING,) * len(chain.hops)
    return sum(map(len, encode(Result(chain.session, chain.epoch, _POSITION, end, codec.code, timings, payload))))
