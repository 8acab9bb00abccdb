"""Compiled steps give the results of the family's own code, for every family whose entry has `native_step`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from splitnet.blocks.fast import describe
from splitnet.blocks.fast.describe import Activation, Norm, UnknownPart
from splitnet.blocks.fast.native_step import NativeStep
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import FAMILIES
from splitnet.quant import native
from tests.unit.blocks.test_torch_step import EXPERTS, EXPERTS_IN_CODES, LATENTS
from tests.unit.random_models import random_checkpoint
from tests.unit.span_runs import decoded, windows_of_drafts

COMPILED = {name for name, family in FAMILIES.items() if family.native_step}
WITH_EXPERTS = {*EXPERTS, *(family for family, _ in EXPERTS_IN_CODES.values())}
"""Families whose experts compiled steps hold in codes; see test_torch_step.py."""

SIZES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.4},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), LATENTS),
}
"""Sizes of small models, where the usual sizes do not fit."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a norm for the MLP beside that of attention, a key for a group of queries": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "one norm, a key for a group of queries": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "queries, keys and values in turns, with biases": ("falcon", {"multi_query": False, "bias": True}),
    "one after the other": ("falcon", {"parallel_attn": False}),
    "slopes within the scale": ("falcon", {"alibi": True}),
    "slopes of six heads": ("bloom", {"hidden": 96, "num_attention_heads": 6}),
    "slopes of six heads in another order": ("mpt", {"hidden": 96, "num_attention_heads": 6}),
    "turns of a head": ("gpt_bigcode", {"multi_query": False}),
    "another scale in every block": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "norms of their own one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "norms of heads that differ": ("stablelm", {"qk_layernorm": True}),
    "one norm": ("stablelm", {"use_parallel_residual": True}),
    "norms of heads with biases": ("phi", {"qk_layernorm": True}),
    "norms of heads in one weight": ("cohere", {"use_qk_norm": True}),
    "a clip": ("olmo", {"clip_qkv": 0.7}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a low cap": ("gemma2", {"attn_logit_softcapping": 2.0}),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}),
    "a cap that the family does not heed": ("gemma3_text", {"attn_logit_softcapping": 2.0}),
    "rotary embeddings that differ": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            }
        },
    ),
    "exact GELU": ("nemotron", {"hidden_act": "gelu"}),
    "quick GELU": ("nemotron", {"hidden_act": "quick_gelu"}),
    "latent attention": ("deepseek_v3", {**LATENTS, "first_k_dense_replace": 6, "rope_parameters": YARN}),
    "latent attention that turns halves": (
        "deepseek_v3",
        {**LATENTS, "first_k_dense_replace": 6, "rope_interleave": False, "q_lora_rank": None},
    ),
    "latents that are stored": ("deepseek_v2", {**LATENTS, "first_k_dense_replace": 6, "rope_parameters": YARN}),
    "latents that are stored, of six heads": (
        "deepseek_v2",
        {
            **LATENTS,
            "first_k_dense_replace": 6,
            "q_lora_rank": None,
            "hidden": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "attention_bias": True,
        },
    ),
    "latents that are stored, turned in halves": (
        "youtu",
        {**LATENTS, "rope_interleave": False, "rope_parameters": YARN},
    ),
}

NOT_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of sums": ("opt", {"do_layer_norm_before": False}),
    "sums of what is normed": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "another activation": ("opt", {"activation_function": "tanh"}),
    "heads that are not whole vectors": ("gpt_neox", {"hidden": 96}),
    "frequencies that depend on the length": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 1.0,
            }
        },
    ),
    "experts in floats": ("granitemoe", {}),
}

pytestmark = pytest.mark.skipif(
    not native.has_fast_kernels(), reason="steps were not compiled here, or not for this CPU"
)


def load(family: str, folder: Path, sizes: dict[str, Any], **options: Any) -> Span:
    return Span.load(Checkpoint.open(random_checkpoint(family, folder, **sizes)), 1, 5, **options)


def outputs(span: Span) -> list[torch.Tensor]:
    """Outputs of sequences that share steps, of one longer than any window, and of windows of drafts."""
    return [decoded(span, (12, 1, 9), 4), decoded(span, (40,), 3), windows_of_drafts(span, (3, 1, 9))]


def check_the_same(span: Span, atol: float) -> None:
    assert isinstance(span._lean, NativeStep)
    compiled = outputs(span)
    span._lean = None
    for found, expected in zip(compiled, outputs(span), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.default_cases(
    family=("bloom", "cohere", "exaone4", "falcon", "gemma2", "gpt2", "gptj", "llama", "opt", "stablelm", "youtu")
)
@pytest.mark.parametrize("family", sorted(COMPILED - WITH_EXPERTS))
def test_a_family_gives_the_same(family: str, tmp_path: Path) -> None:
    check_the_same(load(family, tmp_path, SIZES.get(family, {}), dtype="float32"), 1e-4)


@pytest.mark.default_cases(
    case=(
        "one norm, a key for a group of queries",
        "slopes of six heads",
        "norms of heads that differ",
        "a clip",
        "a low cap",
        "rotary embeddings that differ",
        "quick GELU",
        "latent attention",
        "latents that are stored, of six heads",
    )
)
@pytest.mark.parametrize("case", CASES)
def test_config_variants_give_the_same(case: str, tmp_path: Path) -> None:
    family, sizes = CASES[case]
    check_the_same(load(family, tmp_path, sizes, dtype="float32"), 1e-4)


def test_every_family_with_experts_is_tested_too() -> None:
    assert WITH_EXPERTS <= COMPILED


@pytest.mark.parametrize("case", NOT_KNOWN)
def test_blocks_of_another_structure_have_no_compiled_steps(case: str, tmp_path: Path) -> None:
    family, sizes = NOT_KNOWN[case]
    assert load(family, tmp_path, sizes)._lean is None


@pytest.mark.default_cases(family=("gpt2",), weights=("int8", "int4", "float16"))
@pytest.mark.default_cases(family=("gemma2",), dtype=("bfloat16",))
@pytest.mark.parametrize("family", ["cohere", "falcon", "gemma2", "gpt2", "gpt_neox", "olmo2", "phi3", "youtu"])
@pytest.mark.parametrize(
    ("weights", "dtype", "tolerance"),
    [
        ("int8", "float32", 1e-3),
        ("int4", "float32", 2e-2),
        ("float16", "float32", 1e-3),
        ("bfloat16", "float32", 1e-3),
        ("bfloat16", "bfloat16", 3e-2),
        ("float16", "bfloat16", 3e-2),
        ("int8", "bfloat16", 3e-2),
    ],
)
def test_other_dtypes_give_nearly_the_same(
    family: str, weights: str, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    span = load(family, tmp_path, SIZES.get(family, {}), weights=weights, dtype=dtype)
    assert isinstance(span._lean, NativeStep)
    compiled = outputs(span)
    span._lean = None
    for found, expected in zip(compiled, outputs(span), strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_weights_that_are_transposed_give_the_same_bits_as_before(tmp_path: Path, monkeypatch: Any) -> None:
    """A compiled step changes the order of the weights in memory."""
    folder = random_checkpoint("gpt2", tmp_path)
    found = Span.load(Checkpoint.open(folder), 1, 5)
    found._lean = None
    monkeypatch.setattr(native, "has_fast_kernels", lambda: False)
    plain = Span.load(Checkpoint.open(folder), 1, 5)
    torch.testing.assert_close(decoded(found, (12, 9), 3), decoded(plain, (12, 9), 3), rtol=1e-5, atol=1e-5)


def test_in_half_precision_each_block_must_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test makes one of eight blocks omit the rotary embedding, which is within the rounding errors of all
    blocks."""
    folder = random_checkpoint("llama", tmp_path, blocks=10)

    def kind(dtype: str) -> type[Any]:
        return type(Span.load(Checkpoint.open(folder), 1, 9, dtype=dtype)._lean)

    assert kind("bfloat16") is NativeStep
    monkeypatch.setattr(describe, "_turns", lambda attention: attention.layer_idx != 5)
    assert kind("bfloat16") is not NativeStep


def test_any_error_means_no_compiled_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(block: Any) -> None:
        raise TypeError

    monkeypatch.setattr(describe.BlockDescription, "of", broken)
    assert not isinstance(load("llama", tmp_path, {})._lean, NativeStep)


def test_views_have_the_steps_of_their_blocks(tmp_path: Path) -> None:
    check_the_same(load("exaone4", tmp_path, {}, dtype="float32").view(2, 4), 1e-4)


def test_a_norm_of_another_kind() -> None:
    class ByTheLargest(torch.nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input / input.abs().amax(-1, keepdim=True)

    with pytest.raises(UnknownPart, match="ByTheLargest"):
        Norm.of(ByTheLargest(32))


def test_an_activation_that_is_almost_known() -> None:
    with pytest.raises(UnknownPart, match="Mish"):
        Activation.of(torch.nn.Mish())


def test_an_mlp_with_usual_names_and_other_results_has_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, 0.5 * x))
    assert load("llama", tmp_path, {})._lean is None


LONG = (
    1022,
    1024,
    2049,
    17_000,
)  # positions before: near the borders of parts, and longer parts


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma2", {"sliding_window": 1100, "attn_logit_softcapping": 3.0}),
        pytest.param("bloom", {}, marks=pytest.mark.full),
        pytest.param("youtu", LATENTS, marks=pytest.mark.full),
    ],
)
def test_attention_to_long_sequences_runs_in_parts(family: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    folder = random_checkpoint(family, tmp_path, blocks=2, max_position_embeddings=20_000, **sizes)
    span = Span.load(Checkpoint.open(folder), 0, 2, dtype="float32")
    assert isinstance(span._lean, NativeStep)
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(3 * len(LONG), span.hidden_size, generator=noise, dtype=torch.float32)

    def run(fast: Any, *, alone: int | None = None) -> torch.Tensor:
        span._lean = fast
        rows = [span.new_row() for _ in LONG]
        for row, length in zip(rows, LONG, strict=True):
            span.forward(hidden[:1], [RowChunk(row, 0, 1)])
            seen = torch.Generator().manual_seed(length)
            for block, shapes in row.shapes().items():
                sizes = [(1, heads, length - 1, size) for heads, size in shapes]
                row.append(block, *(2 * torch.randn(size, generator=seen, dtype=torch.float32) for size in sizes))
            row.advance(length - 1)
        if alone is not None:
            return span.forward(hidden[3 * alone : 3 * alone + 3], [RowChunk(rows[alone], rows[alone].length, 3)])
        return span.forward(hidden, [RowChunk(row, row.length, 3) for row in rows])

    compiled, step = run(span._lean), span._lean
    expected = run(None)
    assert (compiled - expected).norm() < 1e-4 * expected.norm()
    for index in range(len(LONG)):  # the same bits, whichever other sequences are in the step
        assert torch.equal(run(step, alone=index), compiled[3 * index : 3 * index + 3])
