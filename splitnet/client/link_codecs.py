"""Which codec each link of a route uses: the one that was asked for, or the cheapest that both ends know."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.encoding import CODING_MS, Encoding, choose_codec, encodings_of
from scheduler.network import Link
from splitnet.client.planner import PlannedHop
from splitnet.client.swarm import Swarm
from splitnet.net.codecs import CODECS, DEFAULT_INT8, Codec, codec_by_name

EMBEDDINGS = codec_by_name("fp16")


class LinkCodecs:
    """Chooses codecs for the links of routes.

    Args:
        swarm: knows the bandwidth of links.
        name: of a codec for every link, or "auto" to choose by cost for each.
        exact_embeddings: what goes to the first hop has at least the precision of `EMBEDDINGS`. Gradients need it: in
            what blocks add to embeddings, errors of integers grow.

    Raises:
        CodecError: there is no such codec.
    """

    def __init__(self, swarm: Swarm, name: str, *, exact_embeddings: bool = False) -> None:
        if name != "auto":
            codec_by_name(name)
        self._swarm = swarm
        self._name = name
        self._exact_embeddings = exact_embeddings

    @property
    def vary(self) -> bool:
        """Whether another route may have other codecs, and so other tokens."""
        return self._name == "auto"

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """What a planner needs to know of the codecs that a link may use."""
        sizes = {name: codec.bytes_per_position(self._swarm.facts.hidden_size) for name, codec in CODECS.items()}
        if self._name == "auto":
            return encodings_of(sizes)
        times = CODING_MS.get(self._name, CODING_MS[DEFAULT_INT8])
        return (Encoding(self._name, sizes[self._name], *times),)

    def to(self, first: PlannedHop) -> Codec:
        """Of the link from the client to the first hop."""
        codec = self._choose(self._swarm.link(None, first.record), first.record.codecs)
        hidden = self._swarm.facts.hidden_size
        too_coarse = codec.bytes_per_position(hidden) < EMBEDDINGS.bytes_per_position(hidden)
        return EMBEDDINGS if self._exact_embeddings and too_coarse else codec

    def after(self, route: Sequence[PlannedHop], index: int) -> Codec:
        """Of the link behind a hop: to the next one, or from the tail to the client."""
        record = route[index].record
        if index + 1 == len(route):
            return self._choose(self._swarm.link(record, None), record.codecs)
        following = route[index + 1].record
        shared = [name for name in record.codecs if name in following.codecs]
        return self._choose(self._swarm.link(record, following), shared)

    def _choose(self, link: Link, spoken: Sequence[str]) -> Codec:
        if self._name != "auto":
            return codec_by_name(self._name)
        hidden = self._swarm.facts.hidden_size
        sizes = {name: CODECS[name].bytes_per_position(hidden) for name in spoken if name in CODECS}
        return codec_by_name(choose_codec(sizes, link.bytes_per_ms))
