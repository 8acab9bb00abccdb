"""A transformers `Cache` for KV caches that peers hold.

transformers reads the length of a cache, crops the cache (speculative decoding), and reorders or selects its rows (beam
search). This cache only counts lengths, and turns reordering into forks, which the next step sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from splitnet.blocks.adapters import AdapterTensors
from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import AdapterError, PeerBusy
from splitnet.hf.parameters import refuse
from splitnet.hf.peft_adapters import LocalAdapters
from splitnet.hf.side_network import Arrangement, SideCache
from splitnet.session.inference import Audit, Session
from splitnet.session.local import MixedSession
from splitnet.wire.messages import Chunk, Fork

ModelSession = Session | MixedSession

RESERVE_STEP = 256  # positions per row by which a reservation grows


class RemoteLayer(CacheLayerMixin):
    """The only layer of a `RemoteCache`: rows of a batch with their left padding, and the session with their KV caches.

    open_session: opens a session with a reservation of positions. scope: the name for `Session.use_namespace`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, open_session: Callable[[int], ModelSession], scope: str = "") -> None:
        super().__init__()
        self._scope = scope
        self.columns = 0  # length of the padded batch
        self.taps: tuple[int, ...] = ()  # see `use_taps`
        self.adapter: AdapterTensors | None = None  # adapter of the blocks, for the cached positions
        self.waited_ms = 0.0  # total wait for peers
        self.session: ModelSession | None = None
        self.reserve_step = RESERVE_STEP  # 1: reserve exactly the positions that are computed
        self._open_session = open_session
        self._padding: list[int] = []
        self._rows: list[int] = []
        self._sources: list[int] | None = None
        self._ids = count(1)
        self._reserved_columns = self._reserved_rows = 0
        self.whole = False  # one step has all positions, so padding may be anywhere
        self.bound: int | None = None  # largest number of columns of a text; None: the reservation grows on demand
        self._restart = True
        self.closed = False
        self.changes = 0  # number of changes of the cached positions
        # From the numbers of positions to their rotary positions, `[batch, columns, axes]`; later columns have the last
        # offsets. None: they are equal.
        self._offsets: torch.Tensor | None = None
        self.rope_length = self.alike = 0  # value of the first step, see `Step`; columns with it
        self.side: SideCache | None = None  # cache of the side network, for the same positions

    @property
    def batch(self) -> int:
        """Rows that the cache holds; 0 before the first step."""
        return len(self._current)

    @property
    def _current(self) -> list[int]:
        """For each row of the batch, the row at the peers that it continues."""
        return self._rows if self._sources is None else self._sources

    @property
    def arrangement(self) -> Arrangement:
        """The rows and their padding, which determine the meaning of columns."""
        return tuple(self._current), tuple(self._padding)

    def use_taps(self, taps: Sequence[int]) -> None:
        """Returns hidden states at these boundaries with the outputs of every step, see `Exchange.tapped`.

        A boundary is a number of blocks; 0: the embeddings. A change of boundaries empties the cache.
        """
        if tuple(taps) != self.taps:
            self.taps = tuple(taps)
            self.renew()

    def begin_step(
        self, mask: torch.Tensor, keep: int, adapter: AdapterTensors | None = None
    ) -> tuple[ModelSession, list[Chunk], list[Fork] | None]:
        """Registers new columns.

        Args:
            mask: `[batch, columns]` bool for past and new columns; False is padding.
            keep: number of last new columns whose outputs are needed; 0: all.

        Returns:
            The session, the parts of the step (nothing is sent if they have no positions), and forks before the step.

        Raises:
            UnsupportedParameter: padding is not on the left, or has changed.
            AdapterError: the cache holds keys and values of another adapter.
            PeerFailed: the adapter does not fit the blocks.
        """
        batch, columns = mask.shape
        self.changes += 1
        if not self.columns:
            self.reset()
            if adapter is not self.adapter and self.session is not None:
                self.session.close()  # a session runs with one adapter
                self.session = None
            self.adapter = adapter
        elif self.batch != batch:
            raise refuse("cache", f"holds {self.batch} rows and the batch has {batch}: give a new cache")
        elif adapter is not self.adapter:
            raise AdapterError("the cache holds keys and values of another adapter: begin with a new cache")
        padding = [0] * batch
        if not bool(mask.all()):
            if not self.whole and not bool((mask[:, 1:] >= mask[:, :-1]).all()):
                text = "has padding that is not on the left: set tokenizer.padding_side = 'left'"
                raise refuse("attention_mask", text)
            padding = (columns - mask.sum(dim=1)).tolist()
        for before, now in zip(self._padding, padding, strict=False):
            if before != now and before < self.columns:
                raise refuse("attention_mask", "has changed at cached positions: begin with a new cache")
        if not self._rows:
            self._rows = [next(self._ids) for _ in range(batch)]
        self._padding = padding
        session = self._reserve(columns, batch)
        forks: list[Fork] | None = None
        if any(pad < columns for pad in padding):
            # After a reset, an empty list of forks drops all rows at the peers.
            forks, self._restart = [] if self._restart else self._take_forks(), False
        parts: list[Chunk] = []
        for row, pad in zip(self._rows, padding, strict=True):
            start = max(0, self.columns - pad)
            length = columns - pad - start
            parts.append(Chunk(row, start, length, min(length, keep) if keep else length))
        self.columns = columns
        return session, parts, forks

    def note_rotary(self, past: int, rotary: torch.Tensor | None) -> None:
        """Notes the rotary positions of the columns from `past` on, `[batch, new, axes]`; None: the numbers of the
        positions."""
        if rotary is None and self._offsets is None:
            return
        new = torch.zeros(self.batch, 1, 1, dtype=torch.int64)
        if rotary is not None:
            numbers = torch.arange(past, self.columns) - torch.tensor(self._padding)[:, None]
            new = (rotary - numbers[..., None]).masked_fill(numbers[..., None] < 0, 0)
        known = new.new_zeros(self.batch, past, 1) if self._offsets is None else self._offsets[:, :past]
        if past and bool((new == known[:, -1:]).all()):
            self._offsets = known
            return
        axes = max(known.shape[2], new.shape[2])
        gap = known[:, -1:].expand(-1, past - known.shape[1], -1)
        self._offsets = torch.cat([part.expand(-1, -1, axes) for part in (known, gap, new)], dim=1)

    @property
    def rotary_offsets(self) -> torch.Tensor | None:
        """`[batch, axes]`: from the numbers of the next positions to their rotary positions; None: they are equal."""
        if self._offsets is None or not self.columns:
            return None
        offsets = self._offsets[:, : self.columns][:, -1]
        return offsets if bool(offsets.any()) else None

    def fitting(self, length: int, ropes: RopeLengths) -> int:
        """Number of columns with the rotary frequencies of a prompt of `length` positions."""
        return min(self.columns, self.alike) if ropes.shortest(length) == self.rope_length else 0

    def mask(self, new: int) -> torch.Tensor:
        """`[batch, columns]` bool for the cached columns, and for new columns without padding."""
        columns = torch.arange(self.columns + new)
        return columns[None] >= torch.tensor(self._padding)[:, None]

    def reserve(self, columns: int, rows: int = 1, *, bounded: bool = False) -> None:
        """Sets a length and a number of rows that are known in advance; the next step reserves memory for them.

        bounded: the text must stay within the length until `grow` has reserved more.
        """
        self._reserved_columns = max(self._reserved_columns, columns)
        self._reserved_rows = max(self._reserved_rows, rows)
        self.bound = self._reserved_columns if bounded else None

    def grow(self, columns: int) -> bool:
        """Reserves memory up to a length at once, in the middle of a text; False: the peers have no memory.

        Raises as `Session.reserve`, except PeerBusy.
        """
        assert self.session is not None
        try:
            self.session.reserve((self.prefix_length + columns) * self._rows_to_hold(self.batch))
        except PeerBusy:
            return False
        self._reserved_columns = self.bound = columns
        return True

    def give_up_room(self) -> None:
        """Drops the reservation after peers have refused a session, because a later call may need less."""
        if self.session is not None and not self.session.hops:
            self.session.close()
            self.session, self._reserved_columns, self._reserved_rows = None, 0, 0

    def _rows_to_hold(self, batch: int) -> int:
        return max(batch, self._reserved_rows)

    @property
    def reserved(self) -> int:
        """Positions that peers reserve for each row."""
        return self.prefix_length + self._reserved_columns

    def fetch_kv(self, index: int) -> dict[str, torch.Tensor]:
        """`Session.fetch_kv` for a row of the batch, without its padding. Raises ValueError: there is no such row."""
        if self.session is None or self._sources is not None or not 0 <= index < len(self._rows):
            raise ValueError(f"the cache holds no row {index}: run the model with it first")
        return self.session.fetch_kv(self._rows[index], self.columns - self._padding[index])

    @property
    def _audits(self) -> list[Audit]:
        session = self.session
        sessions = session.sessions if isinstance(session, MixedSession) else [session] if session is not None else []
        return [session.audit for session in sessions if session.audit is not None]

    @property
    def lied(self) -> bool:
        """Whether an audit shows that a hop has lied, so that cached positions may be wrong."""
        return any(audit.lie is not None for audit in self._audits)

    def finish_audits(self) -> None:
        """Waits until the hops that are new to the client were examined. Raises PeerLied."""
        for audit in self._audits:
            audit.finish()

    def renew(self) -> None:
        """Empties the cache, and frees the peers' memory; the next step opens another session."""
        self.reset()
        if self.session is not None:
            self.session.close()
        self.session, self._reserved_columns, self._reserved_rows = None, 0, 0

    def close(self) -> None:
        """Frees the peers' memory. Any thread may call this."""
        self.closed = True
        if self.session is not None:
            self.session.close()

    def close_later(self) -> None:
        """Frees the peers' memory within a second, in another thread. Takes no lock, so finalizers may call this."""
        self.closed = True
        if self.session is not None:
            self.session.close_later()

    def rewind(self, columns: int, padding: Sequence[int]) -> None:
        """Keeps the first columns, with other padding; the positions of each row stay the same."""
        self.changes += 1
        if columns <= 0 or (self._offsets is not None and list(padding) != self._padding):
            self.reset()
            return
        self.columns = columns
        self._padding = list(padding)

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last `-tokens_to_remove` columns; the next step drops them at the peers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        self.changes += 1
        self.columns = max(0, self.columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        chosen = torch.arange(self.batch)[indices.cpu()].tolist()
        if chosen != list(range(self.batch)):
            self._select(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            self._select([index for index in range(self.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Drops all rows; keeps the session and its reservation."""
        self.changes += 1
        self.columns, self._offsets = 0, None
        self._rows, self._sources, self._padding, self._restart = [], None, [], True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("keys and values live on the peers")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object):
        raise NotImplementedError("keys and values live on the peers")

    def _select(self, chosen: Sequence[int]) -> None:
        self.changes += 1
        if self._rows:
            side = self.side if self.side is not None and self.side.arrangement == self.arrangement else None
            self._sources = [self._current[index] for index in chosen]
            self._padding = [self._padding[index] for index in chosen]
            self._offsets = None if self._offsets is None else self._offsets[list(chosen)]
            self.side = None if side is None else side.selected(chosen, self.arrangement)

    def _take_forks(self) -> list[Fork] | None:
        """Forks that give the peers the rows of the batch. The first successor of a row keeps its id: no copy."""
        if self._sources is None:
            return None
        forks: list[Fork] = []
        for source in self._sources:
            taken = any(fork.row == source for fork in forks)
            forks.append(Fork(next(self._ids) if taken else source, source))
        self._rows = [fork.row for fork in forks]
        self._sources = None
        return forks

    @property
    def prefix_length(self) -> int:
        """Positions of the adapter's prefix, before the first column of every row."""
        return self.adapter.prefix_length if self.adapter is not None else 0

    def _reserve(self, columns: int, batch: int) -> ModelSession:
        if columns > self._reserved_columns:
            self._reserved_columns = -(-columns // self.reserve_step) * self.reserve_step
        positions = self.reserved * self._rows_to_hold(batch)
        if self.session is None:
            self.session = self._open_session(positions)
            self.session.use_namespace(self._scope)
            if self.adapter is not None:
                self.session.use_adapter(self.adapter)
            if self.taps:
                self.session.use_taps(self.taps)
            if self.closed:  # another thread has closed the cache before the session existed
                self.session.close()
        else:
            try:
                self.session.reserve(positions)
            except PeerBusy:
                self._reserved_columns = self._reserved_rows = 0  # a later call may need less
                raise
        return self.session


class RemoteCache(Cache):
    """The cache of `generate()`, see `RemoteLayer`."""

    def __init__(self, open_session: Callable[[int], ModelSession], scope: str = "") -> None:
        self.remote = RemoteLayer(open_session, scope)
        super().__init__(layers=[self.remote])

    @property
    def session(self) -> ModelSession | None:
        return self.remote.session

    def close(self) -> None:
        """Frees the peers' memory and ends the cache. Any thread may call this; see `SessionDriver.close`."""
        self.remote.close()

    def __del__(self) -> None:
        # The garbage collector may run this in a thread that holds a lock which `close` takes.
        if not self.remote.closed:
            self.remote.close_later()


class CachedSession:
    """The cache of `RemoteCausalLM.session()` and its tokens. The caller closes the cache.

    ropes: lengths of texts at which the model's rotary frequencies change.
    """

    def __init__(self, cache: RemoteCache, adapters: LocalAdapters, ropes: RopeLengths) -> None:
        self.cache = cache
        self._adapters = adapters
        self._ropes = ropes
        self._tokens: torch.Tensor | None = None
        self._padding: list[int] = []
        self._follows = False
        self._changes = 0  # of the cache at `remember`: the caller may change the cache, too

    def resume(self, ids: torch.Tensor, mask: torch.Tensor | None, *, follows: bool) -> None:
        """Crops the cache to its common prefix with the next prompt `[rows, seq]`; leaves at least one token to run.

        follows: the rows of the cache will be the rows of the output, without other tokens.
        """
        layer, before = self.cache.remote, self._padding
        if layer.lied:
            layer.renew()
        held = self._tokens if layer.changes == self._changes else None
        padding = [0] * len(ids) if mask is None else [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
        self._tokens, self._padding, self._follows = None, padding, follows
        columns = 0
        alike = follows and held is not None and len(held) == layer.batch == len(ids)
        if alike and held is not None and self._adapters.current(layer.adapter) is layer.adapter:
            rows = zip(held, before, ids, padding, strict=True)
            shared = [pad + _shared(old[pad_before : layer.columns], new[pad:]) for old, pad_before, new, pad in rows]
            columns = min(ids.shape[1] - 1, *shared)
        fitting = layer.fitting(ids.shape[1] - min(padding, default=0), self._ropes)
        layer.rewind(min(columns, fitting), padding)

    def remember(self, tokens: torch.Tensor | None) -> None:
        """Notes the tokens of the cache after a generation, `[rows, seq]`; None: unknown."""
        follows, self._follows = self._follows, False
        self._changes = self.cache.remote.changes
        self._tokens = tokens if follows else None


def _shared(held: torch.Tensor, new: torch.Tensor) -> int:
    """Length of the common prefix of two texts, in tokens."""
    length = min(len(held), len(new))
    same = held[:length] == new[:length].to(held.device)
    return length if bool(same.all()) else int(same.int().argmin())
