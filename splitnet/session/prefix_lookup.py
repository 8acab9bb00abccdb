"""Looks up the first positions of a text among the pages that peers have stored: pure logic, without I/O or a clock.

    ASKING ──> COPYING ──> ASKED
       └─────────────────────^

`SessionState` reports each new text and each answer of a hop. The events of this module tell it to ask the hops again
(`AskAgain`), to have hops copy pages (`CopyFrom`), or to continue from the stored positions (`Settled`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from splitnet.blocks.adapters import AdapterTensors, write_groups
from splitnet.errors import SplitnetError
from splitnet.session.events import LookUpPrefix
from splitnet.session.failover import RouteHop
from splitnet.wire.codecs import Codec
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_LABELS, Chunk, CopyPages, Opened
from splitnet.wire.sent_log import PAGE, SentLog, digest

WORTH_COPYING = 16 * PAGE
"""A copy is made if another peer has this many more positions than a hop: fewer are computed sooner than copied."""


@dataclass(frozen=True, slots=True)
class LookUpNamespace:
    """The sessions that may find each other's stored pages.

    salt: start of page labels, which peers do not know; None: hops store no pages. shared: other keys may find the
    pages, where the owner of a peer allows that.
    """

    salt: bytes | None = None
    shared: bool = False

    @property
    def stores_pages(self) -> bool:
        return self.salt is not None


NO_PAGES = LookUpNamespace()


def positions_to_look_up(parts: Sequence[Chunk]) -> int:
    """How many first positions of a step are looked up among stored pages; 0: the step does not begin a single text."""
    part = parts[0]
    if len(parts) > 1 or part.start or not part.keep:
        return 0
    return min((part.length - part.keep) // PAGE, MAX_LABELS) * PAGE


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """A peer that had stored the first `positions` of a text, for the blocks `[start, end)`."""

    name: str
    endpoint: Endpoint
    blocks: tuple[int, int]
    positions: int

    def has_more(self, hop: RouteHop, positions: int) -> bool:
        """Whether the peer may have at least `positions` of all blocks of a hop, which is another peer."""
        covers = self.blocks[0] <= hop.blocks[0] and hop.blocks[1] <= self.blocks[1]
        return covers and self.name != hop.name and self.positions >= positions


class Stage(StrEnum):
    """The progress of the lookup on one route.

    ASKING: hops report their stored pages. COPYING: hops copy pages from other peers. ASKED: hops report their pages
    after copying, or there is nothing to copy.
    """

    ASKING = "asking"
    COPYING = "copying"
    ASKED = "asked"


class AskAgain(NamedTuple):
    """The answers of the hops are out of date: all hops must be opened again."""


class CopyFrom(NamedTuple):
    """Hops, by their endpoints, must be sent these requests; once they have answered, `all_opened` follows."""

    requests: list[tuple[Endpoint, CopyPages]]


class Settled(NamedTuple):
    """The lookup is over. log: the session's log, cut to the stored positions of a new text; None: no positions
    are stored."""

    log: SentLog | None


@dataclass(slots=True, eq=False)
class PrefixLookup:
    """The lookup of one session's text.

    Args:
        session, model, blocks, hidden_size: see `SessionState`.
        number: returns the number of the next request.

    Attributes:
        namespace: where pages are looked up and stored; set before the first use.
        text: the new text that is being looked up; None: there is none.
        hit: first positions of the text that at least one hop had stored; the client does not send them.
        reused: first positions of the text that every hop had stored.
        sources: peers that may have stored pages of the text, set by the driver.
        stage: stage of the lookup on the route that is being opened.
    """

    session: bytes
    model: str
    blocks: tuple[int, int]
    hidden_size: int
    number: Callable[[], int]
    namespace: LookUpNamespace = NO_PAGES
    text: LookUpPrefix | None = None
    hit: int = 0
    reused: int = 0
    sources: tuple[PrefixSource, ...] = ()
    stage: Stage = Stage.ASKING
    _hops: Sequence[RouteHop] = ()  # hops of the route that is being opened
    _codec: Codec = field(init=False)  # codec of the first link of this route
    _adapter: AdapterTensors | None = None
    _adapter_digest: bytes = b""  # digest of the adapter; computed when it is first needed
    _renamed: bool = False  # contexts have changed once on this route

    def use_adapter(self, adapter: AdapterTensors) -> None:
        """Takes in the adapter of the session, on which keys and values depend."""
        self._adapter, self._adapter_digest = adapter, b""

    def begin_text(self, text: LookUpPrefix) -> None:
        """A text begins, which hops may have stored."""
        self.text, self.hit, self.reused = text, 0, 0

    def begin_route(self) -> None:
        """A route is about to be made."""
        self.stage, self._renamed = Stage.ASKING, False

    def expected_log(self, codec: Codec) -> SentLog | None:
        """The log of the new text as if it had been sent: it has the labels, and fills hops that lack positions."""
        assert self.text is not None
        try:
            return self.text.log(codec, self.hidden_size, self.namespace.salt)
        except SplitnetError:  # the step has the same fault, and reports it to the caller
            self.text = None
            return None

    def abandon(self) -> bool:
        """There is no route. Returns whether a text was being looked up."""
        text, self.text = self.text, None
        return text is not None

    # One opening of the route.

    def begin_asking(self, hops: Sequence[RouteHop], codec: Codec) -> None:
        """All hops are about to be opened. codec: of the first link."""
        self._hops, self._codec = hops, codec
        if self.stage is Stage.COPYING:
            self.stage = Stage.ASKED
        contexts = self._contexts() if self.namespace.stores_pages else [b""] * len(hops)
        for hop, context in zip(hops, contexts, strict=True):
            hop.context = context

    def question(self, hop: RouteHop, log: SentLog | None) -> tuple[int, tuple[bytes, ...]]:
        """The row and the labels that `Open` asks a hop for; `(0, ())`: none."""
        row = log.only_row if log is not None and (self.text is not None or not hop.filled) else None
        hop.asked_prefix = row is not None and bool(hop.context)
        if log is None or row is None or not hop.asked_prefix:
            return 0, ()
        return row, log.labels(row)[:MAX_LABELS]

    def hop_opened(self, hop: RouteHop, message: Opened) -> None:
        """A hop has answered `Open`."""
        hop.cached_positions, hop.prefix_hit = message.cached_positions, message.looked_up and hop.asked_prefix
        if hop.prefix_hit:  # a hop that was not asked would still hold the prefix that it was asked for before
            hop.filled, hop.adapter_version = False, 0
        hop.stores = message.stores

    def all_opened(self, log: SentLog | None, excluded: Collection[str]) -> AskAgain | CopyFrom | Settled:
        """All hops have answered `Open`, or the requests of `CopyFrom`. excluded: names of unusable peers."""
        named = [hop.context for hop in self._hops]
        if any(named) and named != self._contexts():
            # A hop holds its weights in another format than its record says. A second change on one route does not
            # count.
            if not self._renamed:
                self._renamed = True
                return AskAgain()
            self.namespace = NO_PAGES
            for hop in self._hops:
                hop.cached_positions = 0 if hop.prefix_hit else hop.cached_positions
        if self.stage is Stage.COPYING:
            return AskAgain()
        if self.stage is Stage.ASKING:
            copies = self._copies(log, excluded)
            self.stage = Stage.COPYING if copies else Stage.ASKED
            if copies:
                return CopyFrom(copies)
        return Settled(self._settle(log))

    def _copies(self, log: SentLog | None, excluded: Collection[str]) -> list[tuple[Endpoint, CopyPages]]:
        """Requests to copy pages, for hops that have fewer pages than another peer."""
        may_copy = log is not None and self.namespace.stores_pages and not self.namespace.shared
        row = log.only_row if log is not None and may_copy else None
        if log is None or row is None:
            return []
        labels, copies = log.labels(row)[:MAX_LABELS], list[tuple[Endpoint, CopyPages]]()
        for hop in self._hops:
            held = hop.cached_positions if hop.prefix_hit else 0
            lacks = hop.prefix_hit or not hop.cached_positions
            if not hop.stores or not hop.context or not lacks or (self.text is None and hop.filled):
                continue
            living = (each for each in self.sources if each.name not in excluded)
            covering = [each for each in living if each.has_more(hop, held + WORTH_COPYING)]
            if covering:
                source = max(covering, key=lambda each: each.positions)
                wanted = labels[: source.positions // PAGE]
                message = copy_request(hop, self.session, self.number(), source.endpoint, wanted, rate=None)
                copies.append((hop.endpoint, message))
        return copies

    def _settle(self, log: SentLog | None) -> SentLog | None:
        """The session continues from the longest prefix of a hop; the log fills the other hops."""
        text, self.text = self.text, None
        if text is None or log is None:
            return log
        held = [hop.cached_positions if hop.prefix_hit else 0 for hop in self._hops]
        for hop, positions in zip(self._hops, held, strict=True):
            hop.cached_positions = positions
        self.hit = min(len(log.labels(text.part.row)) * PAGE, max(held)) // PAGE * PAGE
        self.reused = min(self.hit, *held)
        if self.hit:
            log.crop(text.part.row, self.hit)
        return log if self.hit else None

    def _contexts(self) -> list[bytes]:
        """For each hop, a digest of everything but the text that determines its keys and values."""
        if self._adapter is not None and not self._adapter_digest:
            self._adapter_digest = digest(*write_groups(self._adapter.of_blocks(*self.blocks)))
        codecs, names = [self._codec, *(hop.codec for hop in self._hops)], [self.model.encode(), self._adapter_digest]
        names += [f"{h.blocks} {h.weights} {c.name}".encode() for h, c in zip(self._hops, codecs, strict=False)]
        return [digest(*names[: end + 3]) for end in range(len(self._hops))]


def copy_request(
    hop: RouteHop, session: bytes, number: int, source: Endpoint, labels: tuple[bytes, ...], *, rate: float | None
) -> CopyPages:
    """Asks a peer to copy pages of a hop's blocks from `source`.

    rate: bytes per second; None: unlimited, but only as long as copying is faster than computing the pages.
    """
    to, what = (session, rate or 1e12, rate is None, number), (*hop.blocks, hop.codec.code, hop.context, labels)
    return CopyPages(*to, *what, source.key.raw, source.address, source.relays)
