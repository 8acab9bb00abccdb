"""A span on a GPU computes what it does on the CPU, whatever its weights are held as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitnet.model.checkpoint import Checkpoint
from splitnet.model.device_forms import DeviceForm, device_form
from splitnet.model.grouped_forms import hold_stored
from splitnet.model.held_linear import HeldLinear
from splitnet.model.memory import free_memory, give_back_memory
from splitnet.model.span import Part, Span
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
"""How far outputs may be from those of the CPU, by what weights are held as and what blocks compute in."""

HIDDEN = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: random_checkpoint(name, folder / name, blocks=4, hidden=HIDDEN) for name in FAMILIES}


def session(span: Span) -> list[torch.Tensor]:
    """Two rows of which passes have prompts, single positions and both, one rewound and one forked, on the CPU."""
    noise = torch.Generator().manual_seed(0)
    first, second = span.new_row(), span.new_row()

    def run(*given: tuple[int, int]) -> torch.Tensor:
        hidden = torch.randn(sum(count for _, count in given), span.hidden_size, generator=noise)
        rows = (first, second)
        return span.forward(hidden, [Part(rows[row], rows[row].length, count) for row, count in given]).float().cpu()

    outputs = [run((0, 5), (1, 9)), run((0, 1), (1, 1)), run((0, 1), (1, 4)), run((1, 1))]
    first.crop(3)
    second = second.fork(6)
    return [*outputs, run((0, 2), (1, 1)), run((0, 1), (1, 1))]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_cpu(
    family: str, kind: str, dtype: str, device: str, checkpoints: dict[str, Path]
) -> None:
    checkpoint = Checkpoint.open(checkpoints[family])
    here = Span.load(checkpoint, 1, 3, weights=kind, dtype=dtype)
    there = Span.load(checkpoint, 1, 3, weights=kind, dtype=dtype, device=device)
    assert there.device == torch.device(device) and there.weights.kind == kind
    assert (there.kv_bytes_per_position, there.state_bytes) == (here.kv_bytes_per_position, here.state_bytes)
    for got, expected in zip(session(there), session(here), strict=True):
        # Of the median position: where experts are chosen, a position near the border may get others.
        away = ((got - expected).norm(dim=1) / expected.norm(dim=1)).median()
        assert away <= KINDS[kind, dtype]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("count", [1, 7, 90])
def test_codes_stand_for_the_same(name: str, count: int, device: str) -> None:
    matrix = matrix_of(LAYOUTS[name], 64, 512, seed=1)
    held = hold_stored([matrix], torch.device(device))
    assert torch.equal(held.dequantised(torch.float32).cpu(), matrix.floats())
    rows = torch.randn(count, 512, generator=torch.Generator().manual_seed(2))
    exact = rows @ matrix.floats().T
    assert (held.multiply(rows.to(device)).cpu() - exact).norm() <= 1e-4 * exact.norm()
    indices = torch.tensor([3, 60, 3])
    assert torch.equal(held.rows(indices.to(device)).cpu(), matrix.floats()[indices])


@pytest.mark.parametrize("name", ["int4", "GPTQ", "Q4_K", "int8 by output", "FP8 by output"])
def test_kernels_of_the_device_prove_themselves_or_are_named(
    name: str, gpu: str, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = matrix_of(LAYOUTS[name], 256, 1024, seed=1)
    made = device_form(hold_stored([matrix], torch.device(gpu)), torch.bfloat16)
    if made is None:
        pytest.skip(f"made anew at every call: {[record.getMessage() for record in caplog.records]}")
    for count in (1, 16, 17, 200):
        rows = torch.randn(count, 1024, generator=torch.Generator().manual_seed(count)).bfloat16()
        exact = rows.float() @ matrix.floats().T
        assert (made.multiply(rows.to(gpu)).float().cpu() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_memory_is_what_was_foretold(kind: str, gpu: str, checkpoints: dict[str, Path]) -> None:
    give_back_memory()
    allocated = torch.accelerator.memory_allocated(gpu)
    span = Span.load(Checkpoint.open(checkpoints["llama"]), 0, 4, weights=kind, dtype="bfloat16", device=gpu)
    give_back_memory()
    held = torch.accelerator.memory_allocated(gpu) - allocated
    assert span.weight_bytes <= held <= 1.2 * span.weight_bytes + 2**20
    assert free_memory(gpu) > 0
    forms = [layer.held for layer in span._backbone.modules() if isinstance(layer, HeldLinear)]
    print(kind, sum(isinstance(form, DeviceForm) for form in forms), "of", len(forms), "layers have a kernel")
