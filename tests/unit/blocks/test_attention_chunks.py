"""Attention in chunks of positions gives what it gives at once, forward and back, in families of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitnet.blocks import attention
from splitnet.blocks import span as spans
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import Chunk, Span
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
"""Scores of four heads by 40 positions: of a position or two at once."""


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
        first = span.forward(hidden, [Chunk(row, 0, count) for row, count in zip(rows, LENGTHS, strict=True)])
        more = [Chunk(row, count, count) for row, count in zip(rows, LENGTHS, strict=True)]
        return [first, span.forward(hidden.flip(0), more)]

    whole = run()
    monkeypatch.setattr(attention, "SCORE_BYTES", TIGHT)
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-4)


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
    monkeypatch.setattr(spans, "PASS", 5)
    torch.testing.assert_close(SpanPasses(span).forward(hidden, lengths, None, 0, 3), whole, rtol=1e-4, atol=1e-4)


def test_the_way_back_is_refused_where_torch_would_keep_too_much(
    span_of: Callable[[str], Span], hidden: torch.Tensor
) -> None:
    passes = SpanPasses(span_of("llama"), graph_bytes=10_000)
    with pytest.raises(PeerBusy, match="fewer positions"):
        passes.backward(hidden, LENGTHS, hidden, None, 0, 3)


@pytest.mark.parametrize("family", BY_ROWS)
def test_the_way_back_is_refused_where_its_scores_do_not_fit(
    family: str, span_of: Callable[[str], Span], hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = span_of(family)
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    with pytest.raises(PeerBusy, match="train with shorter sequences"):
        SpanPasses(span).backward(hidden, LENGTHS, hidden, None, 0, 3)
