"""The rows of sessions at a peer: their KV caches, the stored pages that rows begin with, and the pages that rows
leave.

Rows are allocated ahead of their positions, so that a step seldom moves them, and all rows of a session together stay
within its reservation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch

from peers.prefixes import NOWHERE, STATES, Page, PageNamespace, PrefixStore, UsePages, page_name
from peers.queue import WorkQueue
from peers.served import ServedBlocks, renumbered
from peers.sessions import HopSession, PrefixHit, PrefixLoad, RowPages, SessionTable, SessionTooLong, Work
from splitnet.blocks.kv_cache import FIRST_CAPACITY, SequenceCache
from splitnet.blocks.span import RowChunk, Span
from splitnet.errors import ProtocolError
from splitnet.quant.device import seconds_after_work
from splitnet.security.identity import AuthorizedKeys
from splitnet.wire.codecs import are_finite
from splitnet.wire.messages import CopyPages, FetchKV, Open, Step
from splitnet.wire.receipts import records_of_page
from splitnet.wire.sent_log import PAGE, fork_rows, page_ends

log = logging.getLogger(__name__)

# Share of the reservation that rows may allocate in addition; with a smaller share, full sessions often move rows.
AHEAD = 1 / 8
PAGE_BYTES = 1 << 20  # upper limit of the bytes of a packed page in addition to its numbers
OUTPUT_BYTES = 16  # upper limit, per position and hidden value, of a page's encoded output and block inputs
LOADED_AT_ONCE = 1 << 27  # bytes of pages that are loaded into a row before other steps run
LOADED_BESIDE = 1 << 25  # the same while several keys are active

ViewOf = Callable[[int, int], Span]


@dataclass(eq=False)
class Rows:
    """The rows of all sessions: a part of the service.

    The engine's thread calls it, unless a method says that its caller holds the lock.
    """

    served: ServedBlocks
    sessions: SessionTable
    keys: AuthorizedKeys
    queue: WorkQueue
    lock: threading.RLock  # of the service

    @property
    def most_page_bytes(self) -> int:
        """Upper limit of the bytes of a packed page."""
        sessions = self.sessions
        outputs = OUTPUT_BYTES * (self.served.hidden_size + self.served.per_layer * self.served.num_blocks)
        return int(PAGE * (sessions.position_bytes + outputs)) + sessions.row_bytes + PAGE_BYTES

    @property
    def cached_bytes(self) -> float:
        """Bytes that rows hold; a session may have fewer blocks than the span. Any thread may read it."""
        block_bytes = self.sessions.position_bytes / (self.served.end - self.served.start)
        # Lists are copied first, because other threads add sessions and rows.
        return sum(
            (session.end - session.start) * cache.length * block_bytes + cache.near_bytes + cache.state_bytes
            for session in list(self.sessions)
            for cache in list(session.row_state.caches.values())
        )

    def namespace(self, store: PrefixStore, owner: bytes, message: Open | CopyPages) -> PageNamespace:
        """The namespace of the pages of a session of the key `owner`."""
        shared = isinstance(message, Open) and message.shared
        group = self.keys.options_of(owner).share if shared else None
        whose = owner if group is None else b"group " + group.encode()
        hop = message.context, message.start, message.end, message.codec
        return store.namespace(whose, *hop, secret=not shared)

    def look_up(self, session: HopSession, message: Open, then: UsePages) -> bool:
        """Takes over the namespace of an `Open`, and looks for stored pages, see `PrefixStore.lookup_prefix`. False:
        there is nothing to look for. The caller holds the lock."""
        store, own = self.sessions.prefixes, session.row_state
        if store is None:
            return False
        namespace = self.namespace(store, session.owner, message)
        if namespace != session.namespace or message.labels:
            session.namespace, own.hit = namespace, None
        if not message.labels or message.row in own.caches:
            return False
        store.lookup_prefix(namespace, message.labels[: session.reservation // PAGE], then)
        return True

    def found(self, session: HopSession, message: Open, pages: Sequence[Page]) -> None:
        """Has the row of an `Open` begin with stored pages. The caller holds the lock."""
        if pages:
            session.row_state.hit = PrefixHit(message.row, pages, message.labels)
            self.queue.put_prefix_hit(session)

    def held_positions(self, session: HopSession) -> tuple[int, bool, bool]:
        """For `Opened`: positions after which steps can continue, whether the positions are stored pages, and whether
        rows leave pages. The caller holds the lock."""
        own = session.row_state
        held = own.hit.positions if own.hit else sum(cache.length for cache in list(own.caches.values()))
        return held, own.hit is not None, bool(session.namespace.name)

    def count_read(self, session: HopSession, message: FetchKV, now: float) -> None:
        """Counts a request for keys and values. Raises PeerBusy: too many of them. The caller holds the lock."""
        if message.row in session.row_state.caches:
            session.count_resent(now, "its keys and values were sent")

    def read_keys_and_values(self, session: HopSession, message: FetchKV, span: Span) -> dict[str, torch.Tensor]:
        """The first keys and values of a row. Raises ProtocolError: the row has fewer."""
        cache = session.row_state.caches.get(message.row)
        if cache is None or not 0 < message.length <= cache.length:
            raise ProtocolError(f"there are fewer than {message.length} positions in row {message.row}")
        return span.keys_and_values(cache, message.length)

    def is_quick(self, work: Work) -> bool:
        """Whether a step only computes its positions: it copies and moves no row, and recomputes no positions."""
        step, caches = work.step, work.session.row_state.caches
        if step.forks is not None:
            return False
        for part in step.parts:
            cache = caches.get(part.row)
            if cache is None:
                if caches:  # other rows may give back memory
                    return False
            elif cache.room < part.start + part.length or (
                cache.has_states and min(part.start, cache.computed) < cache.length
            ):
                return False
        return True

    def is_loading(self, work: Work, view_of: ViewOf) -> bool:
        """Loads some of the stored pages with which a step's row begins. True: pages remain, so the step waits while
        other steps run; False: the row has all its pages, or no page was found."""
        session, own = work.session, work.session.row_state
        load = own.load
        if load is None and own.hit is None:
            return False
        span = view_of(session.start, session.end)
        if load is None or load.work is not work:
            self.queue.release_prefix_hit(session)
            hit, part = self._take_hit(work), work.step.parts[0]
            if hit is None:
                own.load = None
                return False
            # A row depends on an adapter only through the adapter's prefix.
            prefixed = session.prefix_length or (load is not None and load.cache.prefix_length)
            if load is None or not load.is_start_of(hit) or prefixed:
                load = own.load = self._new_load(session, hit, part.start + part.length, span)
            load.hit, load.work = hit, work
        self._load_some(session, load, span.device)
        if not load.is_unfinished:
            self._begin_row(work, load, span.device)
            own.load = None
        return load.is_unfinished

    def load_ahead(self, session: HopSession, view_of: ViewOf) -> bool:
        """Loads some of the pages that were found for a session before its step comes, so that all hops of a route load
        at the same time. True: pages remain."""
        own = session.row_state
        hit, load = own.hit, own.load
        # If there are other rows, the pages could exceed the reservation; a load of another text would restart from the
        # start.
        if session.closed or own.caches or session.prefix_length or hit is None or (load and not load.is_start_of(hit)):
            return False
        span = view_of(session.start, session.end)
        load = own.load = load or self._new_load(session, hit, hit.positions, span)
        self._load_some(session, load, span.device)
        return load.is_unfinished

    def prepare_step(self, work: Work) -> None:
        """Changes the rows and the log of a session to the state in which a step begins.

        Raises as `prepare_rows`, and PeerBusy: there is no memory for the states of all rows.
        """
        session, step, own = work.session, work.step, work.session.row_state
        if not _continues(session, step):
            kept = own.caches if step.forks is None else (fork.row for fork in step.forks)
            rows = len({*kept, *(part.row for part in step.parts)})
            with self.lock:
                self.sessions.hold_rows(session, max(rows, session.reserved_rows))
            prepare_rows(session, step)
            with self.lock:
                self.sessions.hold_rows(session, rows)  # dropped rows are freed, unless the step was refused
        if session.end != self.served.num_blocks:
            with self.lock:
                session.log.prepare_step(step.parts, step.forks)
        if self.sessions.prefixes is None:
            return
        # A row leaves pages only for the namespace in which all its positions were computed.
        pages = own.pages
        if step.forks is not None:
            held = {fork.row: pages.get(fork.row) or pages.get(fork.source) for fork in step.forks}
            copied = ((row, RowPages(each.namespace, list(each.names))) for row, each in held.items() if each)
            pages = own.pages = dict(copied)
        for part in step.parts:
            if not part.start:
                pages[part.row] = RowPages(work.namespace, [])
            elif part.row not in pages or pages[part.row].namespace != work.namespace:
                pages[part.row] = RowPages(NOWHERE, [])

    def catch_up(self, work: Work, view_of: ViewOf, most: int) -> int:
        """After a rewind, recomputes `most` positions of a row that lacks more than that; returns their number, 0 if
        the step can run. Other steps run between two calls, and the client sees progress."""
        session, caches = work.session, work.session.row_state.caches
        for part in work.step.parts:
            cache = caches.get(part.row)
            if cache is not None and cache.length - cache.computed > most:
                span, began = view_of(session.start, session.end), time.perf_counter()
                computed = span.catch_up(cache, work.adapter, most)
                self.queue.charge(session, seconds_after_work(span.device) - began)
                return computed
        return 0

    def chunks(self, work: Work, count: int, span: Span) -> list[RowChunk]:
        """The next `count` positions of a step as chunks of its rows, which are made if they are new."""
        own = work.session.row_state
        chunks: list[RowChunk] = []
        for part, inputs in zip_longest(work.parts(count), work.inputs):
            cache = own.caches.get(part.row)
            if cache is None:
                cache = own.caches[part.row] = span.new_row(own.new_room[part.row], work.adapter)
            chunks.append(RowChunk(cache, part.start, part.length, work.adapter, work.step.rope_length, inputs))
        return chunks

    def keep_pages(self, work: Work) -> None:
        """Stores the pages that a finished step has completed."""
        session, step, store = work.session, work.step, self.sessions.prefixes
        if store is None or not work.namespace.name or session.closed:
            return
        own = session.row_state
        labels, cost_ms = iter(step.labels), work.compute_ms * PAGE / work.total
        for part in step.parts:
            first = part.start // PAGE
            ending = [next(labels) for _ in range(page_ends(part))]
            cache, pages = own.caches.get(part.row), own.pages.get(part.row)
            if cache is None or pages is None or pages.namespace != work.namespace:
                continue
            del pages.names[first:]
            for index, label in enumerate(ending, first):
                if cache.length < (index + 1) * PAGE:
                    break
                # A row has states only after its last position.
                ends = cache.length == cache.computed == (index + 1) * PAGE
                make = partial(self._page, session, part.row, cache, index, ends)
                with suppress(ValueError):
                    store.put_page(work.namespace, label, make, cost_ms, pages.names)
                pages.names.append(page_name(work.namespace, label))

    def log_hit(self, session: HopSession, hit: PrefixHit | None = None) -> None:
        """Logs the outputs of pages; without `hit` of the pages that no step has used, because the next hop may
        lack some pages. The caller holds the lock."""
        hit = hit or session.row_state.hit
        if hit is None:
            return
        pages = list(zip(hit.pages, hit.labels, strict=False))
        if session.end != self.served.num_blocks:
            session.log.restore_row(hit.row, [(page.output, page.rope_length, label) for page, label in pages])
        size = PAGE * session.log.bytes_per_position
        digests = [records_of_page(page.output[:size], page.rope_length) for page, _ in pages]
        session.digests.restore_row(
            hit.row, [(each, 0, label) for each, (_, label) in zip(digests, pages, strict=True)]
        )

    def _take_hit(self, work: Work) -> PrefixHit | None:
        """The pages that were found for the row of a step, if the step continues them."""
        with self.lock:
            session, part, hit = work.session, work.step.parts[0], work.session.row_state.hit
            if hit is None or work.step.epoch != session.epoch:
                return None
            session.row_state.hit = None
            if part.row != hit.row or not part.start:
                return None
            hit = hit._replace(pages=hit.pages[: -(-part.start // PAGE)])
            self.log_hit(session, hit)
            return hit

    def _new_load(self, session: HopSession, hit: PrefixHit, end: int, span: Span) -> PrefixLoad:
        """A row with room for the pages, and for `end` positions."""
        end = max(hit.positions, end) + session.prefix_length
        room = shared_room({hit.row: end}, {}, room_for(session.reservation))[hit.row]
        return PrefixLoad(span.new_row(room - session.prefix_length, session.adapter), hit)

    def _load_some(self, session: HopSession, load: PrefixLoad, device: torch.device) -> None:
        if not load.is_unfinished:
            return
        began = time.perf_counter()
        nbytes = LOADED_BESIDE if self.queue.is_contended else LOADED_AT_ONCE
        pages = load.hit.pages[load.done : load.done + max(1, nbytes // load.hit.pages[0].nbytes)]
        with self._may_break(load):
            for index, page in enumerate(pages, load.done):
                self.served.check_page(page, session.start, session.end, session.codec.code, first=not index)
            load.cache.fill([renumbered(page.positions, -self.served.start) for page in pages], device)
            load.done += len(pages)
        self.queue.charge(session, seconds_after_work(device) - began)

    def _begin_row(self, work: Work, load: PrefixLoad, device: torch.device) -> None:
        """Replaces all rows with the loaded row. If the pages did not fit, the step is refused like a step of a row
        that does not exist."""
        pages, row, own = load.hit.pages, load.hit.row, work.session.row_state
        with_states = max((count for count, page in enumerate(pages, 1) if page.states), default=0)
        with self._may_break(load):
            states = renumbered(pages[with_states - 1].states, -self.served.start)
            load.cache.restore(states, with_states * PAGE, device)
        if not load.broken:
            own.caches = {row: load.cache}
            own.pages = {row: RowPages(work.namespace, [page.name for page in pages])}
            if self.sessions.prefixes is not None:
                self.sessions.prefixes.used(pages)

    @contextmanager
    def _may_break(self, load: PrefixLoad) -> Iterator[None]:
        """An error while pages are loaded ends the load, and the store drops the pages."""
        try:
            yield
        except Exception:
            log.exception("stored pages do not fit")
            load.broken = True
            if self.sessions.prefixes is not None:
                self.sessions.prefixes.forget_pages(load.hit.pages)

    def _page(self, session: HopSession, row: int, cache: SequenceCache, index: int, ends: bool, name: bytes) -> Page:
        """A page of a row. ends: it ends with the row, so it has states. Raises ValueError: the page is not to be
        stored."""
        if cache.has_states and cache.rotary is not None:
            raise ValueError("positions that run again would need their rotary positions")
        tensors = cache.page(index * PAGE, (index + 1) * PAGE)
        if not are_finite(tensors.values()):
            raise ValueError("the page has values that are not finite")
        if ends:
            tensors |= {STATES + state: tensor for state, tensor in cache.states().items()}
        tensors = renumbered(tensors, self.served.start)
        if session.end == self.served.num_blocks:
            return Page(name, tensors)
        with self.lock:
            return Page(name, tensors, *session.log.page(row, index))


class _RowCopy(NamedTuple):
    source: SequenceCache
    length: int
    prefix_length: int


def _copy_of(cache: SequenceCache | _RowCopy) -> _RowCopy:
    return cache if isinstance(cache, _RowCopy) else _RowCopy(cache, cache.length, cache.prefix_length)


def room_for(reservation: int) -> int:
    """Maximum number of positions that all rows of a session with this reservation may be allocated for."""
    return reservation + int(reservation * AHEAD)


def _continues(session: HopSession, step: Step) -> bool:
    """Whether a step only adds positions to the session's only row, which has room for them: most decode steps do."""
    caches = session.row_state.caches
    if step.forks is not None or len(step.parts) != 1 or len(caches) != 1:
        return False
    part = step.parts[0]
    cache = caches.get(part.row)
    if cache is None or part.start != cache.length:
        return False
    end = part.start + part.length
    return end <= cache.room and cache.prefix_length + end <= session.reservation


def prepare_rows(session: HopSession, step: Step) -> None:
    """Forks and crops the rows of `session` for `step`, and allocates them; a step that is refused changes nothing.

    Raises SessionTooLong: the rows would have more positions than the session has reserved; ProtocolError: a fork of a
    row that does not exist, or a gap before a chunk.
    """
    own = session.row_state
    rows: dict[int, SequenceCache | _RowCopy] = dict(own.caches)
    if step.forks is not None:
        rows = fork_rows(rows, step.forks, _copy_of)
    starts = {part.row: part.start for part in step.parts}
    ends = {row_id: row.prefix_length + row.length for row_id, row in rows.items()}
    for part in step.parts:
        row = rows.get(part.row)
        length, before = (row.length, row.prefix_length) if row is not None else (0, session.prefix_length)
        if part.start > length:
            raise ProtocolError(f"row {part.row} has {length} positions, the step begins at {part.start}")
        ends[part.row] = before + part.start + part.length
    held = sum(ends.values())
    if held > session.reservation:
        raise SessionTooLong(f"the step needs {held} positions, the session has reserved {session.reservation}")
    present = {row_id: row.prefix_length + row.room for row_id, row in rows.items() if not isinstance(row, _RowCopy)}
    room = shared_room(ends, present, room_for(session.reservation))

    def fit(row_id: int, row: SequenceCache) -> None:
        row.crop(starts.get(row_id, row.length))
        row.room = room[row_id] - row.prefix_length

    copies = {row_id: row for row_id, row in rows.items() if isinstance(row, _RowCopy)}
    sources = {id(copy.source) for copy in copies.values()}
    # Dropped and shrinking rows come first, so that the copies can use their memory.
    own.caches = {row_id: row for row_id, row in rows.items() if not isinstance(row, _RowCopy)}
    late = {row_id: row for row_id, row in own.caches.items() if id(row) in sources}
    for row_id, row in own.caches.items():
        if row_id not in late:
            fit(row_id, row)
    forked = {
        row_id: copy.source.fork(starts.get(row_id), room[row_id] - copy.prefix_length)
        for row_id, copy in copies.items()
    }
    for row_id, row in late.items():
        fit(row_id, row)
    own.caches |= forked
    own.new_room = {row_id: room[row_id] - session.prefix_length for row_id in starts if row_id not in own.caches}


def shared_room(ends: Mapping[int, int], present: Mapping[int, int], total: int) -> dict[int, int]:
    """Positions to allocate for each row; their sum is within `total` if the sum of `ends` is within it.

    ends: positions of each row after the step. present: allocated positions of the rows that exist.
    """
    growing = [row for row, end in ends.items() if end > present.get(row, 0)]
    if not growing:
        return {row: present[row] for row in ends}
    room = {row: present[row] for row in ends if row not in growing}
    spare = total - sum(ends.values())
    free = total - sum(room.values()) - sum(ends[row] for row in growing)
    wanted = {row: max(ends[row], FIRST_CAPACITY - ends[row]) for row in growing}
    if free < min(spare // 2, sum(wanted.values())):
        room = {row: ends[row] for row in room}  # rows that do not grow give back positions without content
        free = spare
    share = free // len(growing) if not room else free // 2 // len(growing)
    return room | {row: ends[row] + min(wanted[row], share) for row in growing}
