"""Short steps, in torch or compiled, give the results of the family's own code, which runs where they would not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.fast.native_step import MOST_POSITIONS, NativeStep
from splitnet.blocks.fast.torch_step import TorchStep
from splitnet.blocks.span import TRIALS, RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant import native
from splitnet.quant.grouped import hold_stored
from splitnet.quant.linear import QuantizedLinear
from tests.image_models import IMAGE_MODELS
from tests.published import (
    FP8_CONFIG,
    INT4_CONFIG,
    MOE,
    MXFP4_CONFIG,
    Published,
    fp8_blocks,
    int4_groups,
    mxfp4_experts,
)
from tests.unit.random_codes import LAYOUTS, matrix_of
from tests.unit.random_models import random_checkpoint
from tests.unit.span_runs import decoded, windows_of_drafts

USUAL = ("llama", "mistral", "qwen2", "qwen3", "seed_oss")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
EIGHT_OF_TWO_GROUPS = {"num_local_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
GLM = {
    **EIGHT_OF_TWO_GROUPS,
    "first_k_dense_replace": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "routed_scaling_factor": 2.5,
}
LATENTS = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 16,
    "kv_lora_rank": 48,
    "q_lora_rank": 64,
    "num_key_value_heads": 4,
}
"""Sizes of latent attention: whole vectors, and different sizes, so that mixed-up sizes cause errors."""
EXPERTS_IN_CODES: dict[str, tuple[str, dict[str, Any]]] = {
    "sinks, biases and clamped gates": ("gpt_oss", {"swiglu_limit": 0.7, "num_local_experts": 8}),
    "groups of experts and halves of heads": ("glm4_moe", GLM),
    "norms of heads and shares as they are": ("glm4_moe", {**GLM, "use_qk_norm": True, "norm_topk_prob": False}),
    "norms of all heads": ("minimax_m2", {"num_local_experts": 8}),
    "a gated shared expert": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 96}),
    "shares as softmax has them": ("olmoe", {"num_experts": 8, "norm_topk_prob": False}),
    "softmax with a correction, neighbours that turn": (
        "ernie4_5_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_layer_start_index": 2},
    ),
    "one group and a shared expert": ("solar_open", {"num_local_experts": 8}),
    "a multiplier of what is added": ("granitemoe", {"num_local_experts": 8, "residual_multiplier": 0.5}),
    "numbers of heads within a clip": ("olmoe", {"num_experts": 8, "clip_qkv": 0.7}),
    "latent attention, keys and values stored": (
        "deepseek_v3",
        {**LATENTS, **EIGHT_OF_TWO_GROUPS, "first_k_dense_replace": 2, "routed_scaling_factor": 2.5},
    ),
    "latents stored": ("glm4_moe_lite", {**LATENTS, **EIGHT_OF_TWO_GROUPS, "norm_topk_prob": False}),
    "latents stored, groups that are ignored": (
        "deepseek_v2",
        {**LATENTS, "num_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "latents stored, groups judged by their best expert": (
        "deepseek_v2",
        {**LATENTS, "num_experts": 8, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    ),
}
OTHERS = ("gpt_oss", "ministral3")
COMPILED_ALONE = ("gpt2", "olmo2", "gemma2", "phi3", "smollm3")


@pytest.fixture(params=["compiled", "of torch"], autouse=True)
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of the steps."""
    if request.param == "of torch":
        monkeypatch.setattr(native, "has_fast_kernels", lambda: False)
        return TorchStep
    if not native.has_fast_kernels():
        pytest.skip("steps were not compiled here, or not for this CPU")
    return NativeStep


def load(family: str, folder: Path, dtype: str | None = None, weights: str | None = None) -> Span:
    return Span.load(Checkpoint.open(random_checkpoint(family, folder)), 1, 5, dtype=dtype, weights=weights)


@pytest.mark.default_cases(family=("llama", "qwen3"))
@pytest.mark.parametrize("family", USUAL)
@pytest.mark.parametrize("lengths", [(5,), (5, 1, 9)], ids=["alone", "together"])
def test_short_steps_equal_the_familys_own_code(
    family: str, tmp_path: Path, lengths: tuple[int, ...], step: type
) -> None:
    span = load(family, tmp_path)
    assert type(span._lean) is step
    lean = decoded(span, lengths, 4)
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, lengths, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_taps_equal_those_of_the_familys_code(tmp_path: Path, dtype: str, step: type) -> None:
    """The output equals that of a step without taps."""
    span = load("qwen3", tmp_path, dtype)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    for taps, lean in (((2, 4), True), ((), True), ((2, 4), False)):
        assert type(span._lean) is step
        rows = [span.new_row() for _ in hidden]
        span.forward(hidden.repeat_interleave(4, dim=0), [RowChunk(row, 0, 4) for row in rows])
        if not lean:
            span._lean = None
        found.append(span.forward(hidden, [RowChunk(row, 4, 1) for row in rows], taps).float())
    tapped, plain, expected = found
    assert torch.equal(tapped[:, -64:], plain)
    rounding: Any = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(tapped, expected, **rounding)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_run_as_their_family_runs_them(family: str, tmp_path: Path) -> None:
    span = load(family, tmp_path)
    assert type(span._lean) is TorchStep
    lean = decoded(span, (5, 1, 9), 4)
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, (5, 1, 9), 4), rtol=1e-4, atol=1e-5)


@pytest.mark.default_cases(step=("compiled",), family=("mixtral",))
@pytest.mark.default_cases(step=("of torch",), family=("qwen3_moe",), form=("int4",))
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", ["int4", "float8"])
def test_experts_in_codes_run_as_their_family_runs_them(family: str, form: str, tmp_path: Path, step: type) -> None:
    sizes = {**MOE, "num_experts": 8, "num_local_experts": 8, "intermediate_size": 96}
    store, settings = (int4_groups, INT4_CONFIG) if form == "int4" else (fp8_blocks, FP8_CONFIG)
    published = Published(family, sizes, store=store, quantization=settings)
    published.write(tmp_path / "published", tmp_path / "plain")
    span = Span.load(Checkpoint.open(tmp_path / "published"), 1, 5, dtype="float32")
    assert type(span._lean) is step
    lean = decoded(span, (5, 1, 9), 4)
    windows = windows_of_drafts(span, (3, 1, 9)) if step is NativeStep else None
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, (5, 1, 9), 4), rtol=2e-3, atol=2e-3)
    if windows is not None:
        torch.testing.assert_close(windows, windows_of_drafts(span, (3, 1, 9)), rtol=2e-3, atol=2e-3)


@pytest.mark.default_cases(weights=("int8",), case=("sinks, biases and clamped gates", "latents stored"))
@pytest.mark.default_cases(
    weights=("int4",),
    case=("groups of experts and halves of heads", "a gated shared expert", "numbers of heads within a clip"),
)
@pytest.mark.parametrize("case", EXPERTS_IN_CODES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("step", ["compiled"], indirect=True)
def test_routers_and_shared_experts(case: str, weights: str, tmp_path: Path) -> None:
    family, sizes = EXPERTS_IN_CODES[case]
    folder = random_checkpoint(family, tmp_path / "model", **sizes)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name] = torch.rand_like(tensors[name])
        save_file(tensors, shard, {"format": "pt"})
    span = Span.load(Checkpoint.open(folder), 1, 6, dtype="float32", weights=weights)
    assert type(span._lean) is NativeStep
    compiled, windows = decoded(span, (12, 1, 9), 4), windows_of_drafts(span, (3, 1, 9))
    span._lean = None
    torch.testing.assert_close(compiled, decoded(span, (12, 1, 9), 4), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(windows, windows_of_drafts(span, (3, 1, 9)), rtol=2e-3, atol=2e-3)


@pytest.mark.default_cases(step=("compiled",))
def test_mxfp4_as_gpt_oss_publishes_it(tmp_path: Path, step: type) -> None:
    published = Published("gpt_oss", {"num_local_experts": 4}, store=mxfp4_experts, quantization=MXFP4_CONFIG)
    published.write(tmp_path / "published", tmp_path / "plain")
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 3e-2)):
        span = Span.load(Checkpoint.open(tmp_path / "published"), 0, 6, dtype=dtype)
        assert type(span._lean) is (NativeStep if step is NativeStep else type(None))
        found = decoded(span, (12, 1, 9), 4)
        span._lean = None
        expected = decoded(span, (12, 1, 9), 4)
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.default_cases(step=("compiled",))
@pytest.mark.parametrize("change", ["another activation", "another choice"])
def test_experts_of_another_kind_run_as_their_family_does_it(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.olmoe import modeling_olmoe

    sizes: dict[str, Any] = {"num_experts": 8}
    if change == "another activation":
        sizes["hidden_act"] = "gelu"
    else:
        own: Any = modeling_olmoe.OlmoeTopKRouter.forward
        monkeypatch.setattr(modeling_olmoe.OlmoeTopKRouter, "forward", lambda self, hidden: own(self, -hidden))
    span = Span.load(Checkpoint.open(random_checkpoint("olmoe", tmp_path, **sizes)), 1, 5, weights="int8")
    assert not isinstance(span._lean, NativeStep)


@pytest.mark.default_cases(family=("llama", "qwen3"), counts=((3, 1, 9),))
@pytest.mark.parametrize("family", USUAL)
@pytest.mark.parametrize("counts", [(7,), (3, 1, 9)], ids=["alone", "together"])
def test_several_positions_of_a_sequence(family: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    span = load(family, tmp_path)
    lean = windows_of_drafts(span, counts)
    span._lean = None
    torch.testing.assert_close(lean, windows_of_drafts(span, counts), rtol=1e-4, atol=1e-5)


@pytest.mark.default_cases(name=("Q4_K", "Q8_0", "FP8 in blocks", "NF4", "GPTQ"))
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_in_the_codes_of_a_checkpoint(name: str, tmp_path: Path, step: type) -> None:
    folder = random_checkpoint("qwen3", tmp_path, blocks=2, hidden=256)
    span = Span.load(Checkpoint.open(folder), 0, 2, dtype="float32", weights="int8")
    for module in span._backbone.modules():
        if isinstance(module, QuantizedLinear):
            matrix = matrix_of(LAYOUTS[name], module.out_features, module.in_features, module.out_features)
            module.held = hold_stored([matrix], torch.device("cpu"))
    backbone: Any = span._backbone
    span._lean = None
    expected = decoded(span, (5, 1, 9), 4)
    span._lean = span._fast_step(list(backbone.layers), backbone.rotary_emb)
    assert type(span._lean) is step
    assert (decoded(span, (5, 1, 9), 4) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("lengths", [(1,), (3, 1)])
def test_gradients_do_not_depend_on_short_steps(lengths: tuple[int, ...], tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    hidden = torch.randn(sum(lengths), span.hidden_size, requires_grad=True)
    weights = torch.randn(sum(lengths), span.hidden_size)
    found: list[torch.Tensor] = []
    for lean in (span._lean, None):
        span._lean = lean
        (gradient,) = torch.autograd.grad((span.sequences(hidden, lengths) * weights).sum(), hidden)
        found.append(gradient)
    assert not torch.equal(found[0], weights)  # equality would mean that only the sum with the input has a graph
    torch.testing.assert_close(*found)


def test_a_window_in_the_config_that_the_family_does_not_use(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    span = Span.load(Checkpoint.open(folder), 1, 5)
    assert span._lean is not None
    lean = decoded(span, (9,), 4)
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, (9,), 4), rtol=1e-4, atol=1e-5)


def test_the_memory_layout_of_the_input_does_not_matter(tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    hidden = torch.randn(span.hidden_size, 4).t()
    found = [span.forward(given, [RowChunk(span.new_row(), 0, 4)]) for given in (hidden, hidden.contiguous())]
    torch.testing.assert_close(*found)


def test_only_small_passes_are_compiled(tmp_path: Path, step: type) -> None:
    span = load("llama", tmp_path)
    lean, row = span._lean, span.new_row()
    assert lean is not None
    assert lean.takes([RowChunk(row, 0, 1)] * MOST_POSITIONS)
    assert not lean.takes([RowChunk(row, 0, MOST_POSITIONS + 1)])


def forty_seven(span: Span) -> tuple[torch.Tensor, list[RowChunk]]:
    """A pass of three steps."""
    hidden = torch.randn(24 + 23, span.hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden, [RowChunk(span.new_row(), 0, 24 if row == 3 else 1) for row in range(24)]


@pytest.mark.parametrize("step", ["compiled"], indirect=True)
def test_longer_passes_run_in_several_steps_or_as_a_whole_whichever_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, forward, ran = load("llama", tmp_path), NativeStep.forward, list[int]()
    monkeypatch.setattr(NativeStep, "forward", lambda *given: (ran.append(len(given[1])), forward(*given))[1])
    outputs = [span.forward(*forty_seven(span))]
    timed = ran[: -len(ran) // 4] if span._steps_are_faster[3] else ran
    assert timed == [16] * 3 * TRIALS  # measured with one block
    for faster in (True, False):
        ran.clear()
        span._steps_are_faster[3] = faster
        outputs.append(span.forward(*forty_seven(span)))
        assert ran == ([16, 16, 15] if faster else [])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", ["compiled"], indirect=True)
def test_a_pass_that_fails_in_a_later_step_leaves_rows_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, forward, ran = load("llama", tmp_path), NativeStep.forward, list[int]()

    def failing(*given: Any) -> torch.Tensor:
        ran.append(len(given[1]))
        if len(ran) == 2:
            raise MemoryError
        return forward(*given)

    monkeypatch.setattr(NativeStep, "forward", failing)
    hidden, parts = forty_seven(span)
    span._steps_are_faster[3] = True
    with pytest.raises(MemoryError):
        span.forward(hidden, parts)
    assert [part.row.length for part in parts] == [0] * 24
    torch.testing.assert_close(span.forward(hidden, parts), span.forward(*forty_seven(span)), rtol=1e-4, atol=1e-5)


def test_a_sliding_window_that_was_passed(tmp_path: Path) -> None:
    span = load("mistral", tmp_path)
    assert span._lean is not None
    window = span._backbone.config.sliding_window
    assert window
    lean = decoded(span, (window + 3, 2), 4)
    span._lean = None
    torch.testing.assert_close(lean, decoded(span, (window + 3, 2), 4), rtol=1e-4, atol=1e-5)


@pytest.mark.default_cases(step=("compiled",))
@pytest.mark.default_cases(options=({"weights": "int8"},))
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"weights": "int8"},
        {"weights": "float16"},
        {"weights": "bfloat16", "dtype": "float32"},
        {"weights": "int4", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_dtypes_give_nearly_the_same(tmp_path: Path, options: dict[str, str], step: type) -> None:
    span = load("llama", tmp_path, **options)
    assert type(span._lean) is step
    lean = decoded(span, (5, 2), 3)
    span._lean = None
    plain = decoded(span, (5, 2), 3)
    assert (lean - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_of_another_structure_run_as_their_family_does_it(family: str, tmp_path: Path) -> None:
    assert load(family, tmp_path)._lean is None


@pytest.mark.default_cases(family=("gpt2", "gemma2"))
@pytest.mark.parametrize("family", COMPILED_ALONE)
def test_there_are_steps_of_torch_for_blocks_like_those_of_llama(family: str, tmp_path: Path, step: type) -> None:
    assert isinstance(load(family, tmp_path)._lean, NativeStep) == (step is NativeStep)


def test_blocks_that_only_look_usual_run_as_their_family_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block with the same parts in another order."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: -own(self, x))
    assert load("llama", tmp_path)._lean is None


def test_views_of_a_span_have_short_steps(tmp_path: Path) -> None:
    span = load("llama", tmp_path)
    view = span.view(2, 4)
    assert view._lean is not None
    lean = decoded(view, (3, 4), 3)
    view._lean = None
    torch.testing.assert_close(lean, decoded(view, (3, 4), 3), rtol=1e-4, atol=1e-5)


def test_hooks_of_layers_are_not_passed_over(tmp_path: Path) -> None:
    """PEFT adds LoRA to layers by hooks; a step without an adapter runs the layers with these hooks."""
    span = load("llama", tmp_path)
    before = decoded(span, (4,), 2)
    layer = next(module for module in span._backbone.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: output)
    torch.testing.assert_close(decoded(span, (4,), 2), before)


@pytest.mark.default_cases(family=("hunyuan_vl", "qwen3_vl"))
@pytest.mark.parametrize("family", ["hunyuan_vl", "qwen2_vl", "qwen3_vl", "glm4v", "paddleocr_vl"])
@pytest.mark.parametrize("step", ["compiled"], indirect=True)
def test_steps_with_positions_of_several_axes_equal_the_familys_own_code(
    family: str, tmp_path: Path, step: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    IMAGE_MODELS[family].write(tmp_path / "published")
    span, forward, ran = Span.load(Checkpoint.open(tmp_path / "published"), 0, 2), NativeStep.forward, list[int]()
    monkeypatch.setattr(NativeStep, "forward", lambda *given: (ran.append(len(given[1])), forward(*given))[1])
    lean = span._lean
    assert type(lean) is step
    span._steps_are_faster[3] = True

    def outputs(places: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a short step, of a text behind it, and of a pass of three steps."""
        row = span.new_row()
        hidden, parts = forty_seven(span)
        parts = [replace(part, inputs=PositionInputs(places[: part.count])) for part in parts]
        first = span.forward(hidden[:9], [RowChunk(row, 0, 9, inputs=PositionInputs(places[:9]))])
        return [first, span.forward(hidden[:1], [RowChunk(row, 9, 1)]), span.forward(hidden, parts)]

    axes = torch.arange(24)[:, None].expand(-1, span.rotary_axes)
    in_an_image, few = axes * torch.arange(1, span.rotary_axes + 1), 1 if family == "hunyuan_vl" else 5
    for places, native_runs in ((axes, 5), (in_an_image, few)):
        ran.clear()
        span._lean = lean
        found = outputs(places)
        assert len(ran) == native_runs
        span._lean = None
        for one, expected in zip(found, outputs(places), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
