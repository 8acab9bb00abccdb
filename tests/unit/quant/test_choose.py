"""Weights of linear layers in other formats than floats, with compiled kernels and without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peers.peer_options import PeerOptions, SpanWish
from peers.relocation import fitting_blocks
from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import RowChunk, Span, block_bytes
from splitnet.checkpoint import safetensors
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.store import ReadBytes
from splitnet.errors import OutOfMemory, WeightsError
from splitnet.quant import choose, forms, grouped, native
from splitnet.quant.choose import (
    INT4_TILES,
    INT8_SCALED,
    INT8_TILES,
    NARROW,
    WeightFormat,
    choose_weights,
)
from splitnet.quant.experts import QuantizedExperts
from splitnet.quant.forms import GROUP, FloatForm, ScaledForm
from splitnet.quant.grouped import BlockQuantWeight, JoinedWeight
from splitnet.quant.linear import QuantizedLinear
from splitnet.quant.native import Kernels, has_fast_kernels, has_float_kernels, has_integer_kernels
from splitnet.quant.packed_tensor import CodeLayout
from tests.unit.random_models import random_checkpoint

CPU = torch.device("cpu")
FLOAT16 = WeightFormat(torch.float16)
HIDDEN = 320
LENGTHS = (5, 9)
FAMILIES = ("llama", "qwen3", "gpt2", "mixtral", "falcon", "olmo", "opt")
HELD = ("float16", "bfloat16", "int8", "int4")

# Error of a weight by rounding, relative to the size of the weights: the distance of two neighbours over sqrt(12). The
# distance of floats is at most a unit in the last place, 2^-10 and 2^-7. The weights of these models are normally
# distributed: of some hundred weights the largest is about 3.3 deviations, and 32 weights span about 4.2 deviations.
ROUNDING = {
    "float16": 2**-10 / 12**0.5,
    "bfloat16": 2**-7 / 12**0.5,
    "int8": 3.3 / 127 / 12**0.5,
    "int4": 4.2 / 15 / 12**0.5,
}
STAGES = 4
"""Linear layers of a block that change its output in sequence."""
KERNEL_ROUNDING = 3**0.5 * ROUNDING["bfloat16"]
"""Kernels for integers round inputs and outputs to bfloat16; one kernel also rounds weights."""


def distance(kind: str) -> float:
    """The expected change of a block's output, relative to its size: independent errors add up in squares.

    The factor 2 allows for the operations between the layers.
    """
    return 2 * (STAGES * (ROUNDING[kind] ** 2 + KERNEL_ROUNDING**2 * kind.startswith("int"))) ** 0.5


KERNEL_DISTANCE = 2 * STAGES**0.5 * KERNEL_ROUNDING


@pytest.fixture(params=["compiled", "fallback"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With compiled kernels, or without."""
    if request.param != "compiled":
        monkeypatch.setattr(native, "kernels_here", lambda: Kernels.NONE)
        monkeypatch.setattr(grouped, "kernels_here", lambda: Kernels.NONE)
    elif not (has_integer_kernels() and has_fast_kernels()):
        pytest.skip("splitnet's kernels were not compiled here, or not for this CPU")
    return request.param


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Path] = {}

    def make(family: str) -> Checkpoint:
        if family not in made:
            made[family] = random_checkpoint(family, tmp_path_factory.mktemp(family), blocks=2, hidden=HIDDEN)
        return Checkpoint.open(made[family])

    return make


def held_layers(span: Span) -> dict[str, QuantizedLinear]:
    return {path: layer for path, layer in span._backbone.named_modules() if isinstance(layer, QuantizedLinear)}


def floats_of(checkpoint: Checkpoint, held: Span) -> Span:
    """The same blocks with plain layers, which have the decoded weights."""
    span = Span.load(checkpoint, held.start, held.end)
    span._lean = None  # this step would use the original weights
    for path, layer in held_layers(held).items():
        plain: Any = span._backbone.get_submodule(path)
        weight = layer.held.dequantised(torch.float32)
        plain.weight = nn.Parameter(weight.T if isinstance(plain, Conv1D) else weight, requires_grad=False)
    for path, experts in held._backbone.named_modules():
        for name, form in experts.held.items() if isinstance(experts, QuantizedExperts) else ():
            assert isinstance(form, JoinedWeight)
            weight = torch.stack([form.dequantised(torch.float32, expert) for expert in range(form.experts)])
            setattr(span._backbone.get_submodule(path), name, nn.Parameter(weight, requires_grad=False))
    return span


def outputs(span: Span, hidden: torch.Tensor) -> torch.Tensor:
    return span.forward(hidden, [RowChunk(span.new_row(), 0, len(hidden))])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.default_cases(family=("llama", "mixtral"), kernels=("compiled",))
@pytest.mark.default_cases(family=("gpt2",), kind=("int8", "float16"))
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_computes_almost_what_it_does_in_floats(
    family: str, kind: str, kernels: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(family)
    torch.manual_seed(1)
    hidden = torch.randn(14, HIDDEN)
    held = Span.load(checkpoint, 1, 2, weights=kind, dtype="float32")
    moved = outputs(held, hidden) - hidden
    expected = outputs(Span.load(checkpoint, 1, 2), hidden) - hidden
    assert held_layers(held) and held.dtype == torch.float32 and held.weights.kind == kind
    # The error of the median position, because a position near the border may choose other experts.
    cosine = torch.nn.functional.cosine_similarity(moved, expected, dim=1).median()
    # Two vectors at a relative distance d have a cosine of 1 - d^2 / 2.
    assert cosine >= 1 - distance(kind) ** 2 / 2 - 1e-6
    # Only the rounding of weights causes the error.
    exact = outputs(floats_of(checkpoint, held), hidden) - hidden
    away = ((moved - exact).norm(dim=1) / exact.norm(dim=1)).median()
    assert away < (KERNEL_DISTANCE if kernels != "fallback" and kind.startswith("int") else 1e-5)


@pytest.mark.default_cases(family=("llama",))
@pytest.mark.default_cases(kernels=("compiled",))
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_block_takes_the_predicted_bytes(
    family: str, kind: str, kernels: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(family)
    plain, predicted = block_bytes(checkpoint, None), block_bytes(checkpoint, "float32", kind)
    span = Span.load(checkpoint, 0, 2, weights=kind, dtype="float32")
    assert predicted < plain
    assert abs(span.weight_bytes - 2 * predicted) < 1024  # the frequencies of a rotary embedding
    sizes = ModelSizes.of(checkpoint.source, "float32", kind)
    assert (sizes.block_bytes, sizes.held_as) == (predicted, kind)
    assert sizes.flops_per_position == ModelSizes.of(checkpoint.source).flops_per_position
    memory = 2 * predicted + 1
    assert memory < 2 * plain
    wish = SpanWish(memory=memory)
    assert fitting_blocks(checkpoint, wish, device="cpu", dtype="float32", weights=kind) == 2
    with pytest.raises(OutOfMemory, match="smaller --weights"):
        fitting_blocks(checkpoint, SpanWish(memory=predicted - 1), device="cpu", dtype="float32", weights=kind)


@pytest.mark.default_cases(kernels=("compiled",), kind=("int4", "bfloat16"))
@pytest.mark.default_cases(family=("gpt2",), kind=("int8",))
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gradients_and_low_rank_additions_are_those_of_the_decoded_weights(
    family: str, kind: str, kernels: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(family)
    held = Span.load(checkpoint, 0, 2, weights=kind, dtype="float32")
    exact = floats_of(checkpoint, held)
    torch.manual_seed(2)
    path = "attn.c_attn" if family == "gpt2" else "self_attn.q_proj"
    layer = held_layers(held)[f"{held._container}.1.{path}"]
    adapter = AdapterTensors(
        {
            f"1.{path}.lora_A": torch.randn(4, layer.in_features) / HIDDEN**0.5,
            f"1.{path}.lora_B": torch.randn(layer.out_features, 4),
        }
    )
    hidden, gradient = torch.randn(2, sum(LENGTHS), HIDDEN)
    found: list[list[torch.Tensor]] = []
    for span in (held, exact):
        span.fit_adapter(adapter)
        passes = SpanPasses(span)
        output = passes.forward(hidden, LENGTHS, adapter, 0, 2)
        by_input, by_adapter = passes.backward(hidden, LENGTHS, gradient, adapter, 0, 2)
        found.append([output, by_input, *by_adapter.values()])
        parts = [RowChunk(span.new_row(), 0, length, adapter) for length in LENGTHS]
        assert torch.equal(span.forward(hidden, parts), output)
        assert relative(passes.forward(hidden, LENGTHS, None, 0, 2), output) > 0.01
    tolerance = (
        2 * KERNEL_DISTANCE if kernels != "fallback" and kind.startswith("int") else 1e-4
    )  # two conversions, two blocks
    for actual, expected in zip(*found, strict=True):
        assert relative(actual, expected) < tolerance


needs_compiled = pytest.mark.skipif(
    not (has_integer_kernels() and has_fast_kernels()), reason="splitnet's kernels were not compiled here"
)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (FLOAT16, (49, 33)),
        (FLOAT16, (5, 7)),
        (INT8_SCALED, (5, 7)),
        (INT8_TILES, (49, 70)),
        (INT4_TILES, (5, 64)),
        (INT4_TILES, (48, 96)),
    ],
)
def test_a_layer_in_every_form(form: WeightFormat, shape: tuple[int, int], kernels: str) -> None:
    torch.manual_seed(3)
    outputs, inputs = shape
    assert form.fits(outputs, inputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    layer = QuantizedLinear(inputs, outputs, form, transposed=False, bias=True, dtype=torch.float32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    kinds = {torch.float16: FloatForm, torch.int8: ScaledForm}
    assert type(layer.held) is (BlockQuantWeight if isinstance(form.numbers, CodeLayout) else kinds[form.numbers])
    assert form.bytes_for(outputs, inputs) == sum(buffer.nbytes for buffer in layer.held.buffers())
    assert layer.held.rows_are_independent == (kernels == "compiled" and form != INT8_SCALED)
    stood_for = layer.held.dequantised(torch.float32)
    rows = torch.randn(2, 3, inputs, requires_grad=True)
    product = layer(rows)
    expected = torch.nn.functional.linear(rows, stood_for, bias)
    assert product.shape == (2, 3, outputs)
    assert relative(product.detach(), expected.detach()) < KERNEL_ROUNDING
    gradient = torch.randn_like(product)
    (by_rows,) = torch.autograd.grad(product, rows, gradient)
    (wanted,) = torch.autograd.grad(expected, rows, gradient)
    assert relative(by_rows, wanted) < 1e-6
    assert torch.equal(layer(rows.detach()), product)
    many = torch.randn(200, inputs)
    assert relative(layer(many), torch.nn.functional.linear(many, stood_for, bias)) < KERNEL_ROUNDING
    assert layer(rows[:0]).shape == (0, 3, outputs)


@needs_compiled
@pytest.mark.parametrize("form", [FLOAT16, INT8_TILES, INT4_TILES])
@pytest.mark.parametrize("count", [1, 23, 24, 31, 32, 47, 48, 63, 64, 65, 257, 600])
def test_any_number_of_rows(form: WeightFormat, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_PART", 2**13)
    torch.manual_seed(count)
    held = form.of(torch.randn(77, 96))
    assert held is not None
    rows = torch.randn(count, 96)
    most = 1e-6 if form == FLOAT16 else KERNEL_ROUNDING
    assert relative(held.multiply(rows), rows @ held.dequantised(torch.float32).T) < most


def test_integers_are_the_nearest() -> None:
    torch.manual_seed(4)
    weight = torch.randn(6, 64) * torch.logspace(-6, 3, 6)[:, None]
    weight[5] = 0
    eight = INT8_SCALED.of(weight)
    assert eight is not None
    # Half a step. The scale, which bfloat16 rounds, may leave the largest weight slightly outside.
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((eight.dequantised(torch.float32) - weight).abs() <= steps * (0.5 + 127 * 2**-8)).all()
    four = INT4_TILES.of(weight)
    assert four is not None
    groups = weight.view(6, -1, GROUP)
    spans = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    error = (four.dequantised(torch.float32).view_as(groups) - groups).abs()
    assert (error <= spans * (0.5 / 15 + 2**-7)).all()


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_weights_out_of_range_stay_as_they_are(value: float) -> None:
    weight = torch.randn(48, 320)
    weight[3, 4] = value
    for form in (FLOAT16, NARROW):
        layer = QuantizedLinear(320, 48, form, transposed=False, bias=False, dtype=torch.float32)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert isinstance(layer.held, FloatForm) and layer.held.weight.dtype == torch.float32
        assert torch.equal(layer.held.dequantised(torch.float32).nan_to_num(), weight.nan_to_num())


@pytest.mark.default_cases(kernels=("compiled",))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [None, "float16", "int8", "int4"])
def test_floats_are_freed_while_loading(
    kind: str | None,
    family: str,
    kernels: str,
    checkpoint_of: Callable[[str], Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[StorageWeakRef] = []
    most = 0
    take = safetensors._taken

    def watched(tensor: torch.Tensor, dtype: torch.dtype, read: ReadBytes) -> torch.Tensor:
        nonlocal most
        taken = take(tensor, dtype, read)
        if taken.ndim == 2:
            alive.append(StorageWeakRef(taken.untyped_storage()))
        most = max(most, sum(not reference.expired() for reference in alive))
        return taken

    monkeypatch.setattr(safetensors, "_taken", watched)
    Span.load(checkpoint_of(family), 0, 2, weights=kind)
    if kind is None:
        assert most == len(alive)
    else:
        assert most <= 2 < len(alive)  # the weight that is being packed, and the next one, which is being read


def test_the_form_is_chosen_by_the_device(kernels: str) -> None:
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    cuda = torch.device("cuda")
    found = choose_weights("auto", None, float32, CPU)
    assert (found.kind, found.dtype) == ("float32" if kernels == "fallback" else "float16", float32)
    assert (NARROW in found.forms) == (kernels == "compiled")
    found = choose_weights("auto", None, float16, CPU)
    assert (found.kind, found.dtype) == ("float16", float32 if kernels == "compiled" else float16)
    assert choose_weights("auto", None, float16, cuda) == choose_weights(None, None, float16, cuda)
    for device, dtype in ((CPU, bfloat16), (cuda, bfloat16), (cuda, float32)):
        assert choose_weights("auto", None, dtype, device) == choose_weights(None, dtype, float32, device)
        assert not choose_weights("auto", dtype, dtype, device).forms
    assert choose_weights("float16", None, bfloat16, CPU).dtype == float32
    assert choose_weights("float16", "bfloat16", float32, CPU).dtype == bfloat16
    assert choose_weights("float16", None, bfloat16, cuda) == choose.WeightChoice("float16", float16)
    assert choose_weights("bfloat16", None, float32, CPU) == choose.WeightChoice("bfloat16", bfloat16)
    assert choose_weights("int4", None, bfloat16, CPU).dtype == bfloat16
    assert choose_weights("int8", "float32", bfloat16, cuda).forms == (INT8_SCALED,)
    forms = choose_weights("int8", None, float32, CPU).forms
    assert forms == ((INT8_TILES, INT8_SCALED) if kernels == "compiled" else (INT8_SCALED,))
    assert choose_weights("int4", None, float32, CPU).forms == (INT4_TILES,)


@pytest.mark.skipif(not has_float_kernels(), reason="the kernels were not compiled for this CPU")
@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [(None, "float16", "float16/float32"), ("bfloat16", "bfloat16", "float32"), ("float16", "float16", "float32")],
)
def test_auto_holds_float32_in_half_the_bytes_and_exactly_where_it_can(
    values: str | None, kind: str, text: str, tmp_path: Path
) -> None:
    folder = random_checkpoint("llama", tmp_path / "random", blocks=2, hidden=64)
    if values is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, values))
        folder = tmp_path / "rounded"
        model.float().save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dtype == torch.float32 and PeerOptions().weights == "auto"
    held = Span.load(checkpoint, 0, 2, weights=PeerOptions().weights)
    plain = Span.load(checkpoint, 0, 2)
    assert (held.weights.kind, held.weights.description, held.dtype) == (kind, text, torch.float32)
    assert held.weight_bytes < 0.6 * plain.weight_bytes
    hidden = torch.randn(3, 64)
    distance = relative(outputs(held, hidden), outputs(plain, hidden))
    assert distance < 1e-6 if values else 1e-5 < distance < 1e-3


@pytest.mark.skipif(not has_float_kernels(), reason="the kernels were not compiled for this CPU")
@pytest.mark.parametrize(("family", "computes"), [("llama", torch.float32), ("mixtral", torch.float16)])
def test_a_float16_checkpoint_computes_in_float32_only_where_that_takes_little_memory(
    family: str, computes: torch.dtype, tmp_path: Path
) -> None:
    """Experts are held in the type that blocks compute in."""
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint(family, tmp_path / "random", blocks=2, hidden=64))
    model.half().save_pretrained(tmp_path / "half")
    checkpoint = Checkpoint.open(tmp_path / "half")
    held, plain = (Span.load(checkpoint, 0, 1, weights=kind) for kind in ("auto", None))
    assert held.dtype == computes and held.weight_bytes < 1.1 * plain.weight_bytes
    sizes = ModelSizes.of(tmp_path / "half", weights="auto")
    assert sizes.dtype == str(computes).removeprefix("torch.")
    assert block_bytes(checkpoint, None, "auto") == pytest.approx(held.weight_bytes, rel=0.02)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_not_exact_where_one_layer_stays_in_floats(kind: str) -> None:
    chosen = choose_weights(kind, None, torch.float32, CPU)
    as_it_is = QuantizedLinear(64, 32, chosen.forms[-1], transposed=False, bias=False, dtype=torch.float32)
    as_it_is.weight = nn.Parameter(torch.full((32, 64), torch.inf))
    integers = QuantizedLinear(64, 32, chosen.forms[-1], transposed=False, bias=False, dtype=torch.float32)
    integers.weight = nn.Parameter(torch.randn(32, 64))
    assert isinstance(as_it_is.held, FloatForm) and as_it_is.held.weight.dtype == torch.float32
    assert chosen.as_loaded([as_it_is.held, integers.held, None]).description == f"{kind}/float32"


@pytest.mark.parametrize(
    ("kind", "dtype", "advice"),
    [
        ("float32", "bfloat16", "leave --dtype out, or use --weights bfloat16"),
        ("bfloat16", "float16", "leave --dtype out, or use --weights float16"),
        ("int3", None, "use auto, float32, bfloat16, float16, int8 or int4"),
    ],
)
def test_contradicting_options_are_refused(
    kind: str, dtype: str | None, advice: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(WeightsError, match=advice):
        Span.load(checkpoint_of("llama"), 0, 1, weights=kind, dtype=dtype)


def test_blocks_without_a_layer_that_fits_are_refused_or_stay_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 inputs are not groups of 32.
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path, blocks=1, hidden=40))
    with pytest.raises(WeightsError, match="held as int4: use --weights float32"):
        Span.load(checkpoint, 0, 1, weights="int4")
    monkeypatch.setattr(choose, "_reads_halves_fast", lambda device: True)
    monkeypatch.setattr(choose, "NARROW", INT4_TILES)
    span = Span.load(checkpoint, 0, 1, weights="auto")
    assert (span.weights.kind, span.weight_bytes) == ("float32", Span.load(checkpoint, 0, 1).weight_bytes)


def test_small_layers_and_routers_stay_floats(checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    experts = Span.load(checkpoint_of("mixtral"), 0, 1, weights="int8")
    assert {path.rsplit(".", 1)[-1] for path in held_layers(experts)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    family = {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}
    folder = random_checkpoint("qwen2_moe", tmp_path / "qwen2_moe", blocks=1, hidden=64, **family)
    shared = Span.load(Checkpoint.open(folder), 0, 1, weights="int4")
    paths = {path.split(".", 2)[-1] for path in held_layers(shared)}
    assert "mlp.shared_expert.down_proj" in paths and "mlp.gate" not in paths
