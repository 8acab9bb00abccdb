"""Blocks that the client holds itself: hops without a link."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

import torch

from splitnet.errors import SplitnetError
from splitnet.model.adapters import Adapter
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.kv_cache import RowCache
from splitnet.model.span import Part as SpanPart
from splitnet.model.span import Span
from splitnet.net.messages import Fork, Part
from splitnet.net.rows import fork_rows

Blocks = tuple[int, int]


def parse_local_blocks(text: str, num_blocks: int) -> list[Blocks]:
    """Ranges of blocks in a text such as `0:10` or `0:2,28:30`, in order; ranges that touch become one.

    Raises:
        SplitnetError: it is no such text, or the model has no such blocks.
    """
    ranges: list[Blocks] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", piece)
        if match is None or not int(match[1]) < int(match[2]) <= num_blocks:
            raise SplitnetError(
                f"local blocks {text!r} are no blocks of a model that has {num_blocks}: write START:END, as 0:10 for "
                f"blocks 0 to 9, or several such ranges, as 0:2,{max(num_blocks - 2, 2)}:{num_blocks}"
            )
        ranges.append((int(match[1]), int(match[2])))
    joined: list[Blocks] = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            raise SplitnetError(f"local blocks {text!r} name block {start} twice: write each block once")
        if joined and start == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


class LocalBlocks:
    """The spans of a model that are here, and the ranges between them that peers run. Thread-safe.

    Args:
        spans: in order.
        num_blocks: of the model.
    """

    def __init__(self, spans: Sequence[Span], num_blocks: int) -> None:
        self.stages: list[LocalSpan | Blocks] = []
        """What runs the model, in order: spans that are here, and ranges `[start, end)` that are not."""
        position = 0
        for span in spans:
            if position < span.start:
                self.stages.append((position, span.start))
            self.stages.append(LocalSpan(span))
            position = span.end
        if position < num_blocks:
            self.stages.append((position, num_blocks))

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, blocks: str | None, *, device: str = "cpu", weights: str | None = None
    ) -> LocalBlocks:
        """Reads the weights of these blocks, and no others.

        Args:
            blocks: as in `0:10` or `0:2,28:30`; None: none.
            weights: what they are held as, see `splitnet.model.weights`; None: as they are stored.

        Raises:
            SplitnetError: the model has no such blocks.
            UnsupportedModel, WeightsError, OutOfMemory: as `Span.load`.
        """
        ranges = parse_local_blocks(blocks, checkpoint.num_blocks) if blocks is not None else []
        spans = [Span.load(checkpoint, *blocks, device=device, weights=weights) for blocks in ranges]
        return cls(spans, checkpoint.num_blocks)

    @property
    def ranges(self) -> list[Blocks]:
        """The blocks that are here."""
        return [(stage.start, stage.end) for stage in self.stages if isinstance(stage, LocalSpan)]


class LocalSpan:
    """A span that several sessions of this process share: it runs for one at a time."""

    def __init__(self, span: Span) -> None:
        self.start, self.end = span.start, span.end
        self._span = span
        self._lock = threading.Lock()

    def new_row(self, adapter: Adapter | None) -> RowCache:
        return self._span.new_row(adapter=adapter)

    def run(self, hidden: torch.Tensor, parts: Sequence[SpanPart]) -> torch.Tensor:
        """`[positions, hidden]` -> `[positions, hidden]` float32, see `Span.forward`."""
        with self._lock:
            return self._span.forward(hidden, parts).float()

    def keys_and_values(self, row: RowCache, length: int) -> dict[str, torch.Tensor]:
        """See `Span.keys_and_values`."""
        return self._span.keys_and_values(row, length)

    def fit(self, adapter: Adapter) -> Adapter | None:
        """The part of an adapter that belongs to these blocks, on their device; None: it has none.

        Raises:
            AdapterError: it does not fit them.
        """
        tensors = adapter.within(self.start, self.end)
        if not tensors:
            return None
        own = Adapter({name: tensor.to(self._span.device) for name, tensor in tensors.items()})
        with self._lock:
            self._span.fit(own)
        return own

    def sequences(
        self, hidden: torch.Tensor, lengths: Sequence[int], adapter: Adapter | None, reach: int = 0
    ) -> torch.Tensor:
        """Whole sequences, with a graph where torch records one: see `Span.sequences`."""
        with self._lock:
            return self._span.sequences(hidden, lengths, adapter, reach).to(hidden.device, hidden.dtype)


class LocalRows:
    """The KV caches of one session in a local span. One thread uses them at a time."""

    def __init__(self, span: LocalSpan) -> None:
        self._span = span
        self._rows: dict[int, RowCache] = {}
        self._adapter: Adapter | None = None

    def use_adapter(self, adapter: Adapter) -> None:
        """Before the first step. Raises AdapterError if it does not fit the blocks."""
        self._adapter = self._span.fit(adapter)

    def step(
        self, hidden: torch.Tensor, parts: Sequence[Part], forks: Sequence[Fork] | None, reach: int = 0
    ) -> torch.Tensor:
        """Runs new positions; what the rows hold from a part's start on is forgotten before.

        Args:
            hidden: `[positions, hidden]`.
            parts, forks, reach: see `splitnet.net.messages.Step`; all positions are returned, whatever `keep` says.

        Returns:
            `[positions, hidden]` float32.
        """
        if forks is not None:
            self._rows = fork_rows(self._rows, forks, lambda row: row.fork())
        span_parts: list[SpanPart] = []
        for part in parts:
            row = self._rows.get(part.row)
            if row is None:
                row = self._rows[part.row] = self._span.new_row(self._adapter)
            row.crop(part.start)
            span_parts.append(SpanPart(row, part.start, part.length, self._adapter, reach))
        return self._span.run(hidden, span_parts)

    def close(self) -> None:
        """Forgets all rows."""
        self._rows = {}

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """Keys and values of the first positions of a row, named as in `Session.fetch_kv`."""
        return self._span.keys_and_values(self._rows[row], length)
