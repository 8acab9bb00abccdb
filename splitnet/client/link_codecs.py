"""Which codec each link of a route uses: the one that was asked for, or the cheapest that both ends know."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.codec_choice import choose_codec
from splitnet.client.swarm import PlannedHop, Swarm
from splitnet.net.codecs import CODECS, Codec, codec_by_name


class LinkCodecs:
    """Chooses codecs for the links of routes.

    Args:
        swarm: knows the bandwidth of links.
        name: of a codec for every link, or "auto" to choose by cost for each.
    """

    def __init__(self, swarm: Swarm, name: str) -> None:
        self._swarm = swarm
        self._name = name

    def to(self, first: PlannedHop) -> Codec:
        """Of the link from the client to the first hop."""
        return self._choose(self._swarm.link(first.record).bytes_per_ms, first.record.codecs)

    def after(self, route: Sequence[PlannedHop], index: int) -> Codec:
        """Of the link behind a hop: to the next one, or from the tail to the client."""
        record = route[index].record
        if index + 1 == len(route):
            return self._choose(self._swarm.link(record).bytes_per_ms, record.codecs)
        following = route[index + 1].record
        shared = [name for name in record.codecs if name in following.codecs]
        return self._choose(self._swarm.link_between(record, following).bytes_per_ms, shared)

    def _choose(self, bytes_per_ms: float, spoken: Sequence[str]) -> Codec:
        if self._name != "auto":
            return codec_by_name(self._name)
        hidden = self._swarm.facts.hidden_size
        sizes = {name: CODECS[name].bytes_per_position(hidden) for name in spoken if name in CODECS}
        return codec_by_name(choose_codec(sizes, bytes_per_ms))
