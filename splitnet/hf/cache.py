"""A transformers `Cache` that stands for the KV caches of the peers.

transformers asks a cache for its length, crops it (speculative decoding), reorders its rows (beam search) and selects
rows. Here lengths are counted, and reordering becomes forks that travel with the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from splitnet.blocks.adapters import Adapter
from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import AdapterError, PeerBusy
from splitnet.hf.adapters import LocalAdapters
from splitnet.hf.parameters import refuse
from splitnet.hf.side import Arrangement, SideCache
from splitnet.session.inference import Session
from splitnet.session.local import MixedSession
from splitnet.wire.messages import Chunk, Fork

ModelSession = Session | MixedSession

RESERVE_STEP = 256  # positions per row by which a reservation grows


class RemoteLayer(CacheLayerMixin):
    """The one layer of a `RemoteCache`: rows of a batch with their left padding, and the session that holds them.

    open_session: makes a session for a reservation of positions. scope: see `Session.use_namespace`.
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
        self.adapter: Adapter | None = None  # of the blocks, for the positions that are held
        self.waited_ms = 0.0  # for peers, in all steps together
        self.session: ModelSession | None = None
        self.reserve_step = RESERVE_STEP  # 1: for exactly what is to be computed
        self._open_session = open_session
        self._padding: list[int] = []
        self._rows: list[int] = []
        self._sources: list[int] | None = None
        self._ids = count(1)
        self._reserved_columns = self._reserved_rows = 0
        self.bound: int | None = None  # columns that a text must stay within; None: more memory is asked for as needed
        self._restart = True
        self.closed = False
        self.changes = 0  # of the held positions
        self.reach = self.alike = 0  # that of the first step, see its message, and how many columns have it
        self.side: SideCache | None = None  # of the side network, for the same positions

    @property
    def batch(self) -> int:
        """Rows that the cache holds; 0 before the first step."""
        return len(self._current)

    @property
    def _current(self) -> list[int]:
        """The row of the peers that each row of the batch goes on from."""
        return self._rows if self._sources is None else self._sources

    @property
    def arrangement(self) -> Arrangement:
        """What its rows are, and their padding: with others, columns mean something else."""
        return tuple(self._current), tuple(self._padding)

    def use_taps(self, taps: Sequence[int]) -> None:
        """Has the hidden states at these boundaries come with the outputs of every step, see `Exchange.tapped`: each
        after so many blocks, 0: the embeddings. With others than before, the cache forgets what it holds.
        """
        if tuple(taps) != self.taps:
            self.taps = tuple(taps)
            self.reset()
            if self.session is not None:
                self.session.close()
                self.session = None

    def begin_step(
        self, mask: torch.Tensor, keep: int, adapter: Adapter | None = None
    ) -> tuple[ModelSession, list[Chunk], list[Fork] | None]:
        """Registers new columns.

        Args:
            mask: `[batch, columns]` bool for past and new columns; False is padding.
            keep: how many of the last new columns are wanted back; 0 means all.

        Returns:
            The session, the parts of the step (without positions, nothing is to be sent), and forks of rows before.

        Raises:
            UnsupportedParameter: padding that is not on the left, or not where it was.
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
            if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
                text = "has padding that is not on the left: set tokenizer.padding_side = 'left'"
                raise refuse("attention_mask", text)
            padding = (columns - mask.sum(dim=1)).tolist()
        for before, now in zip(self._padding, padding, strict=False):
            if before != now and before < self.columns:
                raise refuse("attention_mask", "of positions that are cached has changed: begin with a new cache")
        if not self._rows:
            self._rows = [next(self._ids) for _ in range(batch)]
        self._padding = padding
        session = self._reserve(columns, batch)
        forks: list[Fork] | None = None
        if any(pad < columns for pad in padding):
            # No forks at all drop the rows of before a reset.
            forks, self._restart = [] if self._restart else self._take_forks(), False
        parts: list[Chunk] = []
        for row, pad in zip(self._rows, padding, strict=True):
            start = max(0, self.columns - pad)
            length = columns - pad - start
            parts.append(Chunk(row, start, length, min(length, keep) if keep else length))
        self.columns = columns
        return session, parts, forks

    def fitting(self, length: int, ropes: RopeLengths) -> int:
        """How many columns have the rotary frequencies of a prompt of `length` positions."""
        return min(self.columns, self.alike) if ropes.shortest(length) == self.reach else 0

    def mask(self, new: int) -> torch.Tensor:
        """`[batch, columns]` bool for the columns that are held and new ones without padding."""
        columns = torch.arange(self.columns + new)
        return columns[None] >= torch.tensor(self._padding)[:, None]

    def reserve(self, columns: int, rows: int = 1, *, bounded: bool = False) -> None:
        """With the next step, asks the peers for memory up to a length, and for rows, that are known in advance.

        bounded: the text stays within it until `grow` has got more.
        """
        self._reserved_columns = max(self._reserved_columns, columns)
        self._reserved_rows = max(self._reserved_rows, rows)
        self.bound = self._reserved_columns if bounded else None

    def grow(self, columns: int) -> bool:
        """Asks the peers for memory up to a length now, in the middle of a text; False: they have none.

        Raises as `Session.reserve`, but no PeerBusy.
        """
        assert self.session is not None
        try:
            self.session.reserve((self.prefix_length + columns) * self._rows_to_hold(self.batch))
        except PeerBusy:
            return False
        self._reserved_columns = self.bound = columns
        return True

    def give_up_room(self) -> None:
        """After the peers did not take a session: a later call may need less."""
        if self.session is not None and not self.session.hops:
            self.session.close()
            self.session, self._reserved_columns, self._reserved_rows = None, 0, 0

    def _rows_to_hold(self, batch: int) -> int:
        return max(batch, self._reserved_rows)

    @property
    def reserved(self) -> int:
        """Positions that the peers keep free for each row."""
        return self.prefix_length + self._reserved_columns

    def fetch_kv(self, index: int) -> dict[str, torch.Tensor]:
        """See `Session.fetch_kv`; of a row of the batch, without its padding. Raises ValueError: there is no such."""
        if self.session is None or self._sources is not None or not 0 <= index < len(self._rows):
            raise ValueError(f"the cache holds no row {index}: run the model with it first")
        return self.session.fetch_kv(self._rows[index], self.columns - self._padding[index])

    def close(self) -> None:
        """Frees the peers' memory; from any thread."""
        self.closed = True
        if self.session is not None:
            self.session.close()

    def close_later(self) -> None:
        """Has another thread free the peers' memory within a second. Waits for no lock, so finalizers may call it."""
        self.closed = True
        if self.session is not None:
            self.session.close_later()

    def rewind(self, columns: int, padding: Sequence[int]) -> None:
        """Keeps the first columns, with other padding: row by row the same positions come after it."""
        self.changes += 1
        if columns <= 0:
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
        """Forgets the last `-tokens_to_remove` columns; the next step makes the peers forget them too."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
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
        """Forgets all rows; the session and its reservation stay."""
        self.changes += 1
        self.columns = 0
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
            self.side = None if side is None else side.selected(chosen, self.arrangement)

    def _take_forks(self) -> list[Fork] | None:
        """Rows as the peers must have them; the first that continues a row keeps its id, so nothing is copied."""
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
        """Positions that stand before the first column of every row, from an adapter."""
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
            if self.closed:  # by another thread, which could not see the session
                self.session.close()
        else:
            try:
                self.session.reserve(positions)
            except PeerBusy:
                self._reserved_columns = self._reserved_rows = 0  # a later call may need less
                raise
        return self.session


class RemoteCache(Cache):
    """What `generate()` gets as its cache: see `RemoteLayer`."""

    def __init__(self, open_session: Callable[[int], ModelSession], scope: str = "") -> None:
        self.remote = RemoteLayer(open_session, scope)
        super().__init__(layers=[self.remote])

    @property
    def session(self) -> ModelSession | None:
        return self.remote.session

    def close(self) -> None:
        """Frees the peers' memory; the cache cannot be used any more. From any thread; see `SessionDriver.close`."""
        self.remote.close()

    def __del__(self) -> None:
        # The collector may run this where its own thread holds a lock that closing takes.
        if not self.remote.closed:
            self.remote.close_later()


class CachedSession:
    """What `RemoteCausalLM.session()` keeps: a cache, and the tokens that it holds. The caller closes the cache.

    ropes: which lengths of a text the model's rotary frequencies tell apart.
    """

    def __init__(self, cache: RemoteCache, adapters: LocalAdapters, ropes: RopeLengths) -> None:
        self.cache = cache
        self._adapters = adapters
        self._ropes = ropes
        self._tokens: torch.Tensor | None = None
        self._padding: list[int] = []
        self._follows = False
        self._changes = 0  # of the cache, when the tokens were noted: the caller has it, too

    def resume(self, ids: torch.Tensor, mask: torch.Tensor | None, *, follows: bool) -> None:
        """Crops the cache to what it shares with the next prompt `[rows, seq]`, less one token to go on from.

        follows: whether rows of the cache will be those of the output, and hold its tokens alone.
        """
        layer, before = self.cache.remote, self._padding
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
        """Takes in what was generated since `resume`, `[rows, seq]`; None: it is not known."""
        follows, self._follows = self._follows, False
        self._changes = self.cache.remote.changes
        self._tokens = tokens if follows else None


def _shared(held: torch.Tensor, new: torch.Tensor) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(held), len(new))
    same = held[:length] == new[:length].to(held.device)
    return length if bool(same.all()) else int(same.int().argmin())
