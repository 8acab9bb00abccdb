"""Gradients through spans, against autograd through the whole model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.blocks.adapters import LORA_A, LORA_B, AdapterTensors
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from tests.unit.random_models import random_checkpoint

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_oss", "bloom", "mixtral", "opt")
CUTS = ((0, 1), (1, 4), (4, 6))
LENGTHS = (17, 5, 9)
HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = random_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def spans_of(folder: Path) -> list[Span]:
    return [Span.load(Checkpoint.open(folder), start, end) for start, end in CUTS]


def whole_gradient(folder: Path, tokens: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For one sequence: the input of the first block, and the gradient by it, for `gradient` by the last block's
    output."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    backbone = model.base_model
    lists = (module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = next(blocks for blocks in lists if len(blocks) == CUTS[-1][1])
    seen: dict[str, torch.Tensor] = {}

    def before(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen["input"] = hidden.detach().requires_grad_()
        return ((seen["input"], *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": seen["input"]})

    def after(module: Any, args: Any, output: Any) -> None:
        seen["output"] = output if isinstance(output, torch.Tensor) else output[0]

    blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    blocks[-1].register_forward_hook(after)
    backbone(tokens[None], use_cache=False)
    (found,) = torch.autograd.grad(seen["output"], seen["input"], gradient[None])
    return seen["input"][0].detach(), found[0]


@pytest.mark.default_cases(family=("llama", "gpt2", "mixtral", "gemma3_text"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_packed_sequences_is_that_of_the_whole_model(
    family: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(family)
    torch.manual_seed(0)
    gradient = torch.randn(sum(LENGTHS), HIDDEN)
    pieces = gradient.split(LENGTHS)
    wanted = [
        whole_gradient(folder, torch.randint(3, 300, (length,)), piece)
        for length, piece in zip(LENGTHS, pieces, strict=True)
    ]
    hidden = torch.cat([given for given, _ in wanted])
    spans, inputs = spans_of(folder), []
    for span in spans:
        inputs.append(hidden)
        hidden = SpanPasses(span).forward(hidden, LENGTHS, None, span.start, span.end)
    for span, given in zip(reversed(spans), reversed(inputs), strict=True):
        gradient, _ = SpanPasses(span).backward(given, LENGTHS, gradient, None, span.start, span.end)
    expected = torch.cat([found for _, found in wanted])
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_forward_equals_that_of_stored_rows(checkpoint_of: Callable[[str], Path]) -> None:
    span = spans_of(checkpoint_of("llama"))[1]
    hidden = torch.randn(sum(LENGTHS), HIDDEN)
    rows = [RowChunk(span.new_row(), 0, length) for length in LENGTHS]
    span._lean = None
    whole = SpanPasses(span).forward(hidden, LENGTHS, None, span.start, span.end)
    assert torch.equal(whole, span.forward(hidden, rows))


def test_passes_do_not_change_weights_and_input(checkpoint_of: Callable[[str], Path]) -> None:
    span = spans_of(checkpoint_of("llama"))[1]
    hidden = torch.randn(9, HIDDEN)
    before = hidden.clone()
    SpanPasses(span).backward(hidden, (9,), torch.ones(9, HIDDEN), None, 2, 4)
    assert torch.equal(hidden, before) and not hidden.requires_grad
    assert all(weight.grad is None and not weight.requires_grad for weight in span._backbone.parameters())


@pytest.mark.parametrize(("lengths", "shape"), [((4, 4), (9, HIDDEN)), ((9,), (8, HIDDEN))])
def test_unfitting_shapes_are_refused(
    lengths: tuple[int, ...], shape: tuple[int, int], checkpoint_of: Callable[[str], Path]
) -> None:
    span = spans_of(checkpoint_of("llama"))[0]
    with pytest.raises(ValueError):
        SpanPasses(span).backward(torch.randn(9, HIDDEN), lengths, torch.randn(shape), None, 0, 1)


def test_more_urgent_work_may_run_between_two_blocks(checkpoint_of: Callable[[str], Path]) -> None:
    span = spans_of(checkpoint_of("llama"))[1]
    row, decoded = span.new_row(), []
    token = torch.randn(1, HIDDEN)

    def decode() -> None:
        decoded.append(span.forward(token, [RowChunk(row, row.length, 1)]))

    hidden, gradient = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    alone, _ = SpanPasses(span).backward(hidden, (9,), gradient, None, 1, 4)
    disturbed, _ = SpanPasses(span, between=decode).backward(hidden, (9,), gradient, None, 1, 4)
    assert torch.equal(alone, disturbed)
    assert len(decoded) == 6


@pytest.mark.default_cases(share=(0.5,), family=("llama", "gpt_oss", "mixtral"))
@pytest.mark.default_cases(family=("llama",))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kept_graphs_give_the_same_gradients(family: str, share: float, checkpoint_of: Callable[[str], Path]) -> None:
    """The result is the same to the last bit, whether all or some graphs are kept, and the bytes are as predicted."""
    span = spans_of(checkpoint_of(family))[1]
    adapter = None
    if family == "llama":
        layer = "1.self_attn.q_proj"
        torch.manual_seed(2)
        adapter = AdapterTensors({layer + LORA_A: torch.randn(4, HIDDEN), layer + LORA_B: torch.randn(HIDDEN, 4)})
        span.fit_adapter(adapter)
    hidden, gradient = torch.randn(sum(LENGTHS), HIDDEN), torch.randn(sum(LENGTHS), HIDDEN)
    passes = SpanPasses(span)
    run = hidden, LENGTHS, adapter, 1, 4
    assert passes.bytes_to_keep(LENGTHS, adapter, 3) is None
    expected, by_adapter = passes.backward(hidden, LENGTHS, gradient, adapter, 1, 4)
    nbytes = passes.bytes_to_keep(LENGTHS, adapter, 3)
    assert nbytes is not None
    output, way = passes.forward_saving(*run, int(share * nbytes))
    assert torch.equal(output, passes.forward(*run))
    kept = sum(piece.output is not None for pieces in way.pieces for piece in pieces)
    assert kept == {0.0: 0, 0.5: 1, 1.0: 3}[share]
    found, of_adapter = passes.backward_saved(way, gradient)
    assert torch.equal(found, expected)
    assert of_adapter.keys() == by_adapter.keys() and len(by_adapter) == (2 if adapter else 0)
    assert all(torch.equal(of_adapter[name], by_adapter[name]) for name in by_adapter)
    assert not way.pieces
