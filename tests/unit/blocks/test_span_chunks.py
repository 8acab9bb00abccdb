"""Attention in chunks of positions gives the results of one call, forward and backward, in families of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from splitnet.blocks import attention
from splitnet.blocks import span as spans
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import PeerBusy
from tests.unit.random_models import SPARSE, random_checkpoint

PACKED = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2")
BY_ROWS = ("bloom", "deepseek_v32")
OPTIONS = {
    **SPARSE,
    "deepseek_v3": {
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
}
LENGTHS = (23, 9)
HIDDEN = 64
TIGHT = 4 * 3 * 4 * 40
"""Bytes of the scores of four heads by 40 positions, for one position or two at once."""


@pytest.fixture(scope="module")
def span_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Span]:
    made: dict[str, Path] = {}

    def load(family: str) -> Span:
        if family not in made:
            made[family] = random_checkpoint(
                family, tmp_path_factory.mktemp(family), blocks=3, **OPTIONS.get(family, {})
            )
        return Span.load(Checkpoint.open(made[family]), 0, 3)

    return load


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", [*PACKED, *BY_ROWS])
def test_steps(
    family: str, span_of: Callable[[str], Span], hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = span_of(family)

    def run() -> list[torch.Tensor]:
        rows = [span.new_row(50) for _ in LENGTHS]
        first = span.forward(hidden, [RowChunk(row, 0, count) for row, count in zip(rows, LENGTHS, strict=True)])
        more = [RowChunk(row, count, count) for row, count in zip(rows, LENGTHS, strict=True)]
        return [first, span.forward(hidden.flip(0), more)]

    whole = run()
    monkeypatch.setattr(attention, "SCORE_BYTES", TIGHT)
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-4)


@given(
    shared=st.sampled_from([1, 3]),
    group=st.integers(1, 3),
    count=st.integers(2, 40),
    past=st.integers(0, 90),
    window=st.none() | st.integers(1, 120),
    extra=st.sampled_from(["", "sinks", "values of another size"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_blockwise(
    shared: int, group: int, count: int, past: int, window: int | None, extra: str, dtype: torch.dtype, seed: int
) -> None:
    noise, heads, reach = torch.Generator().manual_seed(seed), shared * group, past + count
    shapes = (1, heads, count, 16), (1, shared, reach, 16), (1, shared, reach, 12 if extra.startswith("values") else 16)
    sinks = torch.randn(heads, generator=noise, dtype=torch.float32) if extra == "sinks" else None
    query, keys, values = (3 * torch.randn(shape, generator=noise, dtype=torch.float32).to(dtype) for shape in shapes)
    with torch.inference_mode():
        mixed = attention.attend_blockwise(query, keys, values, {}, window, 0.3, sinks)
    keys, values = (each.double().repeat_interleave(group, dim=1) for each in (keys, values))
    behind = torch.arange(past, reach)[:, None] - torch.arange(reach)
    seen = (behind >= 0) & (behind < (window or reach + 1))
    scores = (query.double() @ keys.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(-1, -1, count, -1)), dim=3)
    expected = scores.softmax(-1)[..., :reach] @ values
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(mixed.double(), expected, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": 11}),
        ("mistral", {"num_key_value_heads": 1}),
        ("gpt_oss", {"sliding_window": 9}),
        ("deepseek_v3", {}),
    ],
)
@pytest.mark.parametrize("block", [4, 7])
def test_steps_by_blocks_of_positions(
    block: int,
    family: str,
    sizes: dict[str, Any],
    hidden: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compared with all positions at once, which the family's own code computes when gradients are recorded."""
    sizes = OPTIONS.get(family, {}) | sizes
    span = Span.load(Checkpoint.open(random_checkpoint(family, tmp_path, blocks=2, **sizes)), 0, 2)
    with torch.enable_grad():
        whole = span.sequences(hidden, [len(hidden)]).detach()
    blockwise = mock.Mock(wraps=attention.attend_blockwise)
    monkeypatch.setattr(attention, "attend_blockwise", blockwise)
    monkeypatch.setattr(attention, "BLOCK", block)
    row = span.new_row()
    parts = [span.forward(some, [RowChunk(row, row.length, len(some))]) for some in hidden.split((3, 20, 9))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert blockwise.called


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that operations make, without views of the given ones."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.nbytes = 0
        self._given = {each.untyped_storage().data_ptr() for each in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, tuple) else (found,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self._given:
                self.nbytes = max(self.nbytes, made.nbytes)
        return found


def test_memory_does_not_grow_with_the_context() -> None:
    largest: list[int] = []
    for past in (2_000, 40_000):
        query, keys = torch.randn(1, 4, 64, 16), torch.randn(1, 2, past + 64, 16)
        with Largest(query, keys) as made, torch.inference_mode():
            attention.attend_blockwise(query, keys, keys, {}, None, None)
        largest.append(made.nbytes)
    assert 0 < largest[1] == largest[0] <= 2 * query.nbytes


@pytest.mark.parametrize("graph_bytes", [200_000, 1 << 30])
@pytest.mark.parametrize("family", [*PACKED, *BY_ROWS])
def test_passes(
    family: str,
    graph_bytes: int,
    span_of: Callable[[str], Span],
    hidden: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    span = span_of(family)
    gradient = hidden.flip(0)
    whole = SpanPasses(span).forward(hidden, LENGTHS, None, 0, 3)
    back, _ = SpanPasses(span).backward(hidden, LENGTHS, gradient, None, 0, 3)
    if family in PACKED:
        monkeypatch.setattr(attention, "SCORE_BYTES", TIGHT)
    passes = SpanPasses(span, graph_bytes=graph_bytes)
    again, _ = passes.backward(hidden, LENGTHS, gradient, None, 0, 3)
    torch.testing.assert_close(again, back, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(attention, "SCORE_BYTES", TIGHT)
    torch.testing.assert_close(passes.forward(hidden, LENGTHS, None, 0, 3), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKED)
def test_long_sequences_run_in_passes(
    family: str, span_of: Callable[[str], Span], hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, lengths = span_of(family), (*LENGTHS[:1], 2, 7)
    whole = SpanPasses(span).forward(hidden, lengths, None, 0, 3)
    monkeypatch.setattr(spans, "PASS_POSITIONS", 5)
    torch.testing.assert_close(SpanPasses(span).forward(hidden, lengths, None, 0, 3), whole, rtol=1e-4, atol=1e-4)


def test_backward_passes_are_refused_where_torch_would_keep_too_much(
    span_of: Callable[[str], Span], hidden: torch.Tensor
) -> None:
    passes = SpanPasses(span_of("llama"), graph_bytes=10_000)
    with pytest.raises(PeerBusy, match="fewer positions"):
        passes.backward(hidden, LENGTHS, hidden, None, 0, 3)


@pytest.mark.parametrize("family", BY_ROWS)
def test_backward_passes_are_refused_where_scores_do_not_fit(
    family: str, span_of: Callable[[str], Span], hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = span_of(family)
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    with pytest.raises(PeerBusy, match="train with shorter sequences"):
        SpanPasses(span).backward(hidden, LENGTHS, hidden, None, 0, 3)
