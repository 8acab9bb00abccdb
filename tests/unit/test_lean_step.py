"""Decode steps in few operations give what the family's own code gives, and are left to it where they would not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitnet.model.checkpoint import Checkpoint
from splitnet.model.span import Part, Span
from tests.unit.random_models import random_checkpoint

USUAL = ("llama", "mistral", "qwen2", "qwen3", "seed_oss")
OTHERS = ("gpt2", "olmo2", "gemma2", "phi3", "qwen3_moe", "gpt_oss")


def load(family: str, folder: Path, dtype: str | None = None, weights: str | None = None) -> Span:
    return Span.load(Checkpoint.open(random_checkpoint(family, folder)), 1, 5, dtype=dtype, weights=weights)


def decoded(span: Span, lengths: tuple[int, ...], steps: int) -> torch.Tensor:
    """Outputs of some steps of sequences that share passes, after prompts of these lengths."""
    torch.manual_seed(7)
    rows = [span.new_row() for _ in lengths]
    prompts = torch.randn(sum(lengths), span.hidden_size)
    span.forward(prompts, [Part(row, 0, length) for row, length in zip(rows, lengths, strict=True)])
    outputs = [
        span.forward(torch.randn(len(rows), span.hidden_size), [Part(row, row.length, 1) for row in rows])
        for _ in range(steps)
    ]
    return torch.stack(outputs).float()


@pytest.mark.parametrize("family", USUAL)
@pytest.mark.parametrize("lengths", [(5,), (5, 1, 9)], ids=["alone", "together"])
def test_it_gives_the_same(family: str, tmp_path: Path, lengths: tuple[int, ...]) -> None:
    span = load(family, tmp_path)
    assert span._lean is not None
    lean = decoded(span, lengths, 4)
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, lengths, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"weights": "int8"}, {"weights": "float16"}], ids=str)
def test_it_gives_nearly_the_same_in_other_types(tmp_path: Path, options: dict[str, str]) -> None:
    span = load("llama", tmp_path, **options)
    assert span._lean is not None
    lean = decoded(span, (5, 2), 3)
    span._lean = None
    plain = decoded(span, (5, 2), 3)
    assert (lean - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_of_another_structure_run_as_their_family_does_it(family: str, tmp_path: Path) -> None:
    assert load(family, tmp_path)._lean is None


def test_blocks_that_only_look_usual_run_as_their_family_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parts, put together in another way."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: -own(self, x))
    assert load("llama", tmp_path)._lean is None


def test_views_of_a_span_have_it_too(tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    view = span.view(2, 4)
    assert view._lean is not None
    lean = decoded(view, (3, 4), 3)
    view._lean = None
    torch.testing.assert_close(lean, decoded(view, (3, 4), 3), rtol=1e-4, atol=1e-5)


def test_hooks_of_layers_are_not_passed_over(tmp_path: Path) -> None:
    """LoRA is put on layers by hooks; a step without an adapter runs through the layers that have them."""
    span = load("llama", tmp_path)
    before = decoded(span, (4,), 2)
    layer = next(module for module in span._backbone.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: output)
    torch.testing.assert_close(decoded(span, (4,), 2), before)
