"""A span on a GPU computes the same as on the CPU, in every weight format."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from splitnet.blocks.fast import graph_step
from splitnet.blocks.fast.graph_step import GraphStep
from splitnet.blocks.fast.torch_step import TorchStep
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant.device import Stopwatch, free_memory, give_back_memory, seconds_after_work, to_device, to_host
from splitnet.quant.gpu import FORMS, device_form
from splitnet.quant.grouped import hold_stored
from splitnet.quant.linear import QuantizedLinear
from tests.gpu.conftest import STAND_IN
from tests.unit.random_codes import LAYOUTS, matrix_of
from tests.unit.random_models import random_checkpoint

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "mixtral", "lfm2")
KINDS = {
    ("float32", "float32"): 1e-4,
    ("bfloat16", "bfloat16"): 0.03,
    ("float16", "float32"): 0.01,
    ("int8", "float32"): 0.01,
    ("int8", "bfloat16"): 0.03,
    ("int4", "float32"): 0.01,
    ("int4", "bfloat16"): 0.03,
}
"""Maximum relative difference from the outputs of the CPU, by weight format and type of the computation."""

HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: random_checkpoint(name, folder / name, blocks=4, hidden=HIDDEN) for name in FAMILIES}


def session(span: Span) -> list[torch.Tensor]:
    """Outputs, on the CPU, of two rows in passes with prompts, single positions and both, with one row cropped and one
    forked."""
    noise = torch.Generator().manual_seed(0)
    first, second = span.new_row(), span.new_row()

    def run(*given: tuple[int, int]) -> torch.Tensor:
        hidden = torch.randn(sum(count for _, count in given), span.hidden_size, generator=noise)
        rows = (first, second)
        return (
            span.forward(hidden, [RowChunk(rows[row], rows[row].length, count) for row, count in given]).float().cpu()
        )

    outputs = [run((0, 5), (1, 9)), run((0, 1), (1, 1)), run((0, 1), (1, 4)), run((1, 1))]
    first.crop(3)
    second = second.fork(6)
    return [*outputs, run((0, 2), (1, 1)), run((0, 1), (1, 1))]


@pytest.mark.default_cases(family=("llama", "lfm2"), kind=("float32",))
@pytest.mark.default_cases(family=("mixtral",), kind=("int8",), dtype=("float32",))
@pytest.mark.default_cases(family=("gpt2",), kind=("bfloat16",))
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_of_the_cpu(
    family: str, kind: str, dtype: str, device: str, checkpoints: dict[str, Path]
) -> None:
    checkpoint = Checkpoint.open(checkpoints[family])
    here = Span.load(checkpoint, 1, 3, weights=kind, dtype=dtype)
    there = Span.load(checkpoint, 1, 3, weights=kind, dtype=dtype, device=device)
    assert there.device == torch.device(device) and there.weights.kind == kind
    assert (there.kv_bytes_per_position, there.state_bytes) == (here.kv_bytes_per_position, here.state_bytes)
    for got, expected in zip(session(there), session(here), strict=True):
        # The difference of the median position counts: in mixtures of experts, rounding may give a position other
        # experts.
        away = ((got - expected).norm(dim=1) / expected.norm(dim=1)).median()
        assert away <= KINDS[kind, dtype]


@pytest.mark.default_cases(family=("llama",), kind=("int8",))
@pytest.mark.default_cases(family=("mixtral",), kind=("bfloat16",))
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("llama", "float32", "float32"),
        ("qwen3", "bfloat16", "bfloat16"),
        ("llama", "int8", "bfloat16"),
        ("mixtral", "bfloat16", "bfloat16"),
        ("mixtral", "int8", "float32"),
    ],
)
def test_steps_from_graphs_equal_those_of_the_cpu(
    family: str, kind: str, dtype: str, device: str, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Rows join and leave, and their memory moves. A view of the span is tested, too."""
    caplog.set_level(logging.INFO, "splitnet")
    checkpoint = Checkpoint.open(checkpoints[family])
    here, there = (Span.load(checkpoint, 0, 4, weights=kind, dtype=dtype, device=where) for where in ("cpu", device))
    if not there.replayed_positions and not STAND_IN:
        pytest.skip(f"steps are not replayed: {[record.getMessage() for record in caplog.records]}")
    noise = torch.Generator().manual_seed(0)
    for spans in ((here, there), (here.view(1, 3), there.view(1, 3))):
        rows = [[span.new_row() for _ in range(6)] for span in spans]
        for counts in ([250, 3, 9, 255, 1, 7], *([1] * count for count in (1, 2, 3, 6, 6, 5, 4, 6, 6, 1))):
            hidden = torch.randn(sum(counts), here.hidden_size, generator=noise)
            expected, got = (
                span.forward(
                    hidden, [RowChunk(row, row.length, count) for row, count in zip(held, counts, strict=False)]
                ).float()
                for span, held in zip(spans, rows, strict=True)
            )
            away = ((got.cpu() - expected).norm(dim=1) / expected.norm(dim=1)).median()
            assert away <= KINDS[kind, dtype]
    assert there.replayed_positions


def test_steps_from_graphs_are_verified_on_cuda(gpu: str, checkpoints: dict[str, Path]) -> None:
    """Graphs recorded by this machine's driver are correct; with such small blocks they need not be faster."""
    if torch.device(gpu).type != "cuda":
        pytest.skip("only CUDA has these graphs")
    span = Span.load(Checkpoint.open(checkpoints["llama"]), 0, 4, dtype="bfloat16", device=gpu)
    step = span._lean.lean if isinstance(span._lean, GraphStep) else span._lean
    assert isinstance(step, TorchStep)
    recorder = graph_step.recorder_for(span.device)
    assert recorder is not None
    with torch.inference_mode():
        for size in graph_step.SIZES:
            rows = graph_step.rows_to_try(span, size)
            given = torch.zeros(size, span.hidden_size, dtype=span.dtype, device=gpu)
            recorded = graph_step.Recorded(step, given, recorder)
            assert graph_step.fault_of(span, step, recorded, rows) is None


@pytest.mark.parametrize("wrong", [False, True])
def test_the_grouped_product_is_verified_or_reported(
    wrong: bool,
    device: str,
    checkpoints: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if wrong:
        own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS._local_mapping,
            "grouped_mm",
            lambda experts, rows, chosen, shares: own(experts, rows, chosen.roll(1, 1), shares),
        )
    span = Span.load(Checkpoint.open(checkpoints["mixtral"]), 0, 2, dtype="bfloat16", device=device)
    warned = [record for record in caplog.records if "run one by one" in record.getMessage()]
    if wrong:
        assert len(warned) == 1 and span._backbone.config._experts_implementation == "eager"
    else:
        print("experts run by", span._backbone.config._experts_implementation, [each.getMessage() for each in warned])
    assert torch.isfinite(span.forward(torch.ones(3, span.hidden_size), [RowChunk(span.new_row(), 0, 3)])).all()


def test_activations_are_copied_unchanged(device: str) -> None:
    noise = torch.Generator().manual_seed(0)
    for shape in ((1, 64), (3, 4096), (600, 4096), (0, 64)):
        values = torch.randn(shape, generator=noise)
        for dtype in (torch.float32, torch.bfloat16):
            there = to_device(values, torch.device(device), dtype)
            assert there.device == torch.device(device) and torch.equal(to_host(there), values.to(dtype))


def test_a_stopwatch_agrees_with_the_clock(gpu: str) -> None:
    device = torch.device(gpu)
    square = torch.zeros(2048, 2048, device=device)
    torch.mm(square, square)
    began = seconds_after_work(device)
    watch = Stopwatch(device)
    for _ in range(20):
        torch.mm(square, square)
    watch.stop()
    assert 0 < watch.seconds <= seconds_after_work(device) - began


@pytest.mark.default_cases(count=(7,), name=("int4", "Q4_K", "GPTQ", "FP8 in blocks", "NF4", "int8 by output"))
@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("count", [1, 7, 90])
def test_codes_represent_the_same_numbers_on_each_device(name: str, count: int, device: str) -> None:
    matrix = matrix_of(LAYOUTS[name], 64, 512, seed=1)
    held = hold_stored([matrix], torch.device(device))
    assert torch.equal(held.dequantised(torch.float32).cpu(), matrix.to_floats())
    rows = torch.randn(count, 512, generator=torch.Generator().manual_seed(2))
    exact = rows @ matrix.to_floats().T
    assert (held.multiply(rows.to(device)).cpu() - exact).norm() <= 1e-4 * exact.norm()
    indices = torch.tensor([3, 60, 3])
    assert torch.equal(held.rows(indices.to(device)).cpu(), matrix.to_floats()[indices])


@pytest.mark.parametrize("name", ["int4", "GPTQ", "Q4_K", "int8 by output", "FP8 by output"])
def test_kernels_of_the_device_are_verified_or_reported(name: str, gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    matrix = matrix_of(LAYOUTS[name], 256, 1024, seed=1)
    made = device_form(hold_stored([matrix], torch.device(gpu)), torch.bfloat16)
    if made is None:
        pytest.skip(f"made anew at every call: {[record.getMessage() for record in caplog.records]}")
    for count in (1, 16, 17, 200):
        rows = torch.randn(count, 1024, generator=torch.Generator().manual_seed(count)).bfloat16()
        exact = rows.float() @ matrix.to_floats().T
        assert (made.multiply(rows.to(gpu)).float().cpu() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_memory_is_as_predicted(kind: str, gpu: str, checkpoints: dict[str, Path]) -> None:
    # Loads once before: memory that libraries and graphs allocate only once does not belong to the span.
    Span.load(Checkpoint.open(checkpoints["llama"]), 0, 4, weights=kind, dtype="bfloat16", device=gpu)
    give_back_memory()
    allocated = torch.accelerator.memory_allocated(gpu)
    span = Span.load(Checkpoint.open(checkpoints["llama"]), 0, 4, weights=kind, dtype="bfloat16", device=gpu)
    give_back_memory()
    held = torch.accelerator.memory_allocated(gpu) - allocated
    assert span.weight_bytes <= held <= 1.2 * span.weight_bytes + 2**20
    assert free_memory(gpu) > 0
    forms = [layer.held for layer in span._backbone.modules() if isinstance(layer, QuantizedLinear)]
    print(kind, sum(isinstance(form, FORMS) for form in forms), "of", len(forms), "layers have a kernel")
