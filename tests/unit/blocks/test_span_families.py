"""Spans of every family, with packed sequences and rewinds, compared with the whole model in transformers alone."""

from __future__ import annotations

import inspect
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from splitnet.blocks.adapters import PREFIX_KEYS, PREFIX_VALUES, AdapterTensors
from splitnet.blocks.client_part import backbone_of, client_part_of, load_client_part
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.blocks.span import RowChunk, Span, block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import FAMILIES, check_can_be_cut
from splitnet.errors import AdapterError, OutOfMemory, UnsupportedModel
from splitnet.quant import device as devices
from splitnet.quant.linear import QuantizedLinear
from tests.unit.random_models import HYBRIDS, SPARSE, random_checkpoint, random_config

CUTS = ((0, 1), (1, 4), (4, 6))
LENGTHS = (17, 25, 9)
TOLERANCE = 1e-5
STATES_TOLERANCE = 3e-5
"""Recurrences sum in another order in steps of another length."""
OWN_DIFFERENCE = {"qwen3_5_moe_text": 6e-5}
"""The error of the whole model itself when transformers runs it in such steps, on some CPUs."""


@dataclass(frozen=True)
class Case:
    """A family, with special values of its config."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join((self.family, *list(self.overrides)[:2]))


def _dynamic_rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **more}, "max_position_embeddings": 16}


PACKS = {name for name, family in FAMILIES.items() if family.packs}
STATES = {name for name, family in FAMILIES.items() if family.states}
NAMED = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "mixtral", "olmo2"),
    *("gpt_oss", "smollm3", "gpt2", "opt", "gpt_neox", "bloom", "falcon"),
)
CASES = [
    *map(Case, NAMED),
    Case("falcon", {"alibi": True}),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("granite", {"embedding_multiplier": 3.0}),
    Case("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    Case("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("qwen3_moe", {"mlp_only_layers": [1, 4]}),
    Case("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    Case("gpt_neo", {"attention_types": [[["global", "local"], 3]], "window_size": 8}),
    Case("mpt"),
    *(Case(family, overrides) for family, overrides in (HYBRIDS | SPARSE).items()),
]
"""Cases with blocks of all kinds: the families that the project supports explicitly, and variants within families."""

STRUCTURES = (
    *map(Case, ("llama", "gemma2", "mixtral", "gpt_oss", "gpt2", "bloom")),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    *(Case(family, (HYBRIDS | SPARSE)[family]) for family in ("jamba", "qwen3_next", "lfm2", "deepseek_v32")),
)
"""Cases with different structures: every other case resembles one of them."""

USUAL_ENDS = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
"""Families that only embed, normalise and multiply around their blocks."""

SIZES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "deepseek_v3": {
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "first_k_dense_replace": 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "gptj": {"rotary_dim": 8},
}
OTHER_CASES = [
    *(Case(family, SIZES.get(family, {})) for family in sorted(PACKS.difference(NAMED, SPARSE))),
    *map(Case, ("biogpt", "nanochat", "diffllama", "xglm")),
]
"""The other families that share passes, and some without an entry in families.py."""


class LocalChain(nn.Module):
    """Spans in this process, in place of a model's blocks; each row of a call is a separate sequence."""

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self.spans = spans

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([Sequences(self.spans).step([(0, row)])[0] for row in hidden])


class Tap(nn.Module):
    """Replaces the blocks: stores their input, and returns `answer`, or the input if that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor | None = None
        self.answer: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen = hidden.clone()
        return hidden if self.answer is None else self.answer


class Sequences:
    """The rows of several sequences in a chain of spans."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.rows: dict[int, list[SequenceCache]] = {}

    def step(self, chunks: Sequence[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Runs new positions `[count, hidden]` of some sequences, packed, through all spans."""
        for key, _ in chunks:
            self.rows.setdefault(key, [span.new_row() for span in self.spans])
        hidden = torch.cat([chunk for _, chunk in chunks])
        for index, span in enumerate(self.spans):
            rows = [self.rows[key][index] for key, _ in chunks]
            parts = [RowChunk(row, row.length, len(chunk)) for row, (_, chunk) in zip(rows, chunks, strict=True)]
            hidden = span.forward(hidden, parts)
        return list(hidden.split([len(chunk) for _, chunk in chunks]))

    def crop(self, key: int, length: int) -> None:
        for row in self.rows[key]:
            row.crop(length)

    def fork(self, key: int, new_key: int) -> None:
        self.rows[new_key] = [row.fork() for row in self.rows[key]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Checkpoints by case, each made once."""
    folders: dict[str, Path] = {}

    def make(case: Case) -> Path:
        if repr(case) not in folders:
            folders[repr(case)] = random_checkpoint(case.family, tmp_path_factory.mktemp(str(case)), **case.overrides)
        return folders[repr(case)]

    return make


@pytest.fixture(scope="module")
def llama(made: Callable[[Case], Path]) -> Checkpoint:
    return Checkpoint.open(made(Case("llama")))


def load_spans(checkpoint: Checkpoint) -> list[Span]:
    return [Span.load(checkpoint, start, end) for start, end in CUTS]


def whole_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.std() > 0.05, "the reference is degenerate"
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_family_with_an_entry_is_among_the_cases() -> None:
    assert {case.family for case in (*CASES, *OTHER_CASES)} >= PACKS | STATES | {
        name for name, family in FAMILIES.items() if family.torch_step or family.one_window
    }


@pytest.mark.default_cases(case=STRUCTURES)
@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES], ids=str)
@torch.inference_mode()
def test_the_ends_compute_all_outside_the_blocks(case: Case, made: Callable[[Case], Path]) -> None:
    tap = Tap()
    client_part = load_client_part(Checkpoint.open(made(case)), tap)
    ends = client_part_of(client_part)
    assert tap.seen is None, "the blocks are left alone"
    if not ends.compute_everything:
        assert case.family not in USUAL_ENDS
        return
    torch.manual_seed(2)
    ids = torch.randint(3, 300, (1, 5))
    tap.answer = torch.randn(1, 5, client_part.config.get_text_config().hidden_size)
    logits = client_part(ids, use_cache=False).logits
    assert tap.seen is not None and torch.equal(ends.embed(ids), tap.seen)
    assert torch.equal(ends.logits(tap.answer), logits)


@pytest.mark.default_cases(case=STRUCTURES)
@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES], ids=str)
@torch.inference_mode()
def test_packed_spans_equal_the_whole_model(case: Case, made: Callable[[Case], Path]) -> None:
    folder = made(case)
    checkpoint = Checkpoint.open(folder)
    whole, tap = whole_model(folder), Tap()
    client_part = load_client_part(checkpoint, tap)
    sequences = Sequences(load_spans(checkpoint))
    torch.manual_seed(1)
    tokens = [torch.randint(3, 300, (1, length)) for length in LENGTHS]
    inputs: list[torch.Tensor] = []
    for ids in tokens:
        client_part(ids)
        assert tap.seen is not None
        inputs.append(tap.seen[0])

    outputs = [torch.full_like(hidden, torch.nan) for hidden in inputs]
    done = [0, 0, 0]

    def step(*chunks: tuple[int, int]) -> None:
        given = [(key, inputs[key][done[key] : done[key] + count]) for key, count in chunks]
        for (key, count), output in zip(chunks, sequences.step(given), strict=True):
            outputs[key][done[key] : done[key] + count] = output
            done[key] += count

    step((0, 5))
    step((0, 1), (1, 11))
    step((0, 1), (1, 1), (2, 3))
    step((2, 1), (0, 1), (1, 1))
    # After a rewind, and with a copy that diverges: neither may change the other.
    sequences.fork(1, new_key=9)
    sequences.step([(9, inputs[0][:7])])
    sequences.crop(1, 8)
    done[1] = 8
    step((1, 3), (2, 2))
    step((2, 1), (1, 1))
    step((1, 13), (0, 1))
    step((0, 8), (2, 2))
    assert done == list(LENGTHS)

    for ids, output in zip(tokens, outputs, strict=True):
        tap.answer = output[None]
        tolerance = OWN_DIFFERENCE.get(case.family, STATES_TOLERANCE) if case.family in STATES else TOLERANCE
        assert_close(client_part(ids).logits, whole(ids).logits, tolerance)


@pytest.mark.default_cases(case=STRUCTURES)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_shell_over_local_spans_equals_the_whole_model(case: Case, made: Callable[[Case], Path]) -> None:
    folder = made(case)
    checkpoint = Checkpoint.open(folder)
    whole = whole_model(folder)
    client_part = load_client_part(checkpoint, LocalChain(load_spans(checkpoint)))
    ids = torch.randint(3, 300, (2, 13))
    assert_close(client_part(ids).logits, whole(ids).logits, STATES_TOLERANCE if case.family in STATES else TOLERANCE)
    assert type(client_part) is type(whole)
    assert client_part.config.num_hidden_layers == checkpoint.num_blocks
    assert "cache" in inspect.signature(type(backbone_of(client_part)).forward).parameters
    blocks = sum(checkpoint.bytes_of((tensor.name for tensor in block), None) for block in checkpoint.block_tensors)
    stored = whole.state_dict(keep_vars=True).values()  # some layers store more than parameters
    whole_bytes = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in stored}.values())
    assert sum(parameter.nbytes for parameter in client_part.parameters()) == whole_bytes - blocks


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", _dynamic_rope(rope_type="dynamic", factor=2.0)),
        Case(
            "phi3",
            _dynamic_rope(
                rope_type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[4.0] * 8,
                original_max_position_embeddings=16,
                partial_rotary_factor=1.0,
            )
            | {"original_max_position_embeddings": 16, "max_position_embeddings": 64, "sliding_window": None},
        ),
    ],
    ids=lambda case: case.family,
)
@torch.inference_mode()
def test_rope_that_depends_on_the_length_is_that_of_each_sequence(case: Case, made: Callable[[Case], Path]) -> None:
    folder = made(case)
    checkpoint = Checkpoint.open(folder)
    long, short = torch.randn(30, 64), torch.randn(22, 64)
    sequences = Sequences(load_spans(checkpoint))
    outputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for start, end in [(0, 8), (8, 9), *((i, i + 1) for i in range(9, 22))]:
        # The long sequence is ahead, past the length at which the rotary embedding changes.
        begin = start + 8 if start else 0
        chunks = [(0, long[begin : end + 8]), (1, short[start:end])]
        for key, output in enumerate(sequences.step(chunks)):
            outputs[key].append(output)
    for key, hidden in enumerate((long, short)):
        fresh = whole_model(folder).model  # a dynamic rotary embedding remembers earlier sequences
        fresh.norm = nn.Identity()
        cache, done = DynamicCache(config=fresh.config), 0
        for output in outputs[key]:
            expected = fresh(inputs_embeds=hidden[None, done : done + len(output)], cache=cache, use_cache=True)[0][0]
            assert_close(output, expected)
            done += len(output)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", _dynamic_rope(rope_type="dynamic", factor=2.0)),
        Case("phimoe", {"rope_parameters": LONG | {"short_mscale": 1.0, "long_mscale": 1.5}}),
        Case("deepseek_v2", SIZES["deepseek_v3"] | {"first_k_dense_replace": 6, "rope_parameters": LONG}),
        Case("gemma3_text", {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), LONG)}),
    ],
    ids=lambda case: case.family,
)
@torch.inference_mode()
def test_positions_have_the_frequencies_of_their_reach(case: Case, made: Callable[[Case], Path]) -> None:
    span = Span.load(Checkpoint.open(made(case)), 0, 6)
    hidden = torch.randn(40, 64)

    def keys(steps: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """The keys of every block, after steps `(start, end, reach)`."""
        row = span.new_row()
        for start, end, reach in steps:
            span.forward(hidden[start:end], [RowChunk(row, start, end - start, None, reach)])
        return [keys for _, keys, _ in row.keys_and_values(40)]

    text = keys([(0, 24, 24), *((position, position + 1, 0) for position in range(24, 40))])
    replayed = keys([(0, 9, 24), (9, 24, 24), (24, 40, 0)])
    for one, other in zip(text, replayed, strict=True):
        assert_close(one, other, 1e-4)
    assert not torch.allclose(text[-1], keys([(0, 9, 0), (9, 24, 0), (24, 40, 0)])[-1], atol=1e-2), "it matters"


TEXT = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
LINEAR = HYBRIDS["qwen3_5_text"] | {f"linear_num_{which}_heads": 2 for which in ("key", "value")}
LINEAR |= {f"linear_{which}_head_dim": 16 for which in ("key", "value")}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
GLM_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
GLM_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
OTHER_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
KIMI_VISION = OTHER_VISION
OTHER_VISION = KIMI_VISION | {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        TEXT | {"sliding_window": 8},
        {
            "num_hidden_layers": 6,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        {"mm_tokens_per_image": 4, "image_token_index": 290, "boi_token_index": 291, "eoi_token_index": 292},
    ),
    "glm4v": (TEXT | {"rope_parameters": GLM_ROPE}, GLM_VISION, {}),
    "glm4v_moe": (TEXT | GLM_MOE | {"rope_parameters": GLM_ROPE}, GLM_VISION, {}),
    "internvl": (TEXT | {"model_type": "qwen2"}, OTHER_VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, {}),
    "kimi_k25": (TEXT | SPARSE["deepseek_v32"] | {"model_type": "deepseek_v3"}, KIMI_VISION, {}),
    "mistral3": (TEXT | {"model_type": "mistral"}, OTHER_VISION | {"model_type": "pixtral", "head_dim": 16}, {}),
    "qwen2_5_vl": (TEXT | {"rope_parameters": MROPE}, QWEN_VISION | {"fullatt_block_indexes": [0]}, {}),
    "qwen2_vl": (
        TEXT | {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        {},
    ),
    "qwen3_vl": (TEXT | {"rope_parameters": ROPE}, QWEN_VISION | {"deepstack_visual_indexes": [0]}, {}),
    "step3p7": (
        TEXT
        | SPARSE["step3p5"]
        | {"sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        {},
    ),
    "qwen3_vl_moe": (
        TEXT | {"rope_parameters": ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
        {},
    ),
    "qwen3_5": (TEXT | LINEAR, QWEN_VISION, {}),
    "gemma4": (
        TEXT | SPARSE["gemma4_text"] | {"num_experts": 4, "moe_intermediate_size": 32, "sliding_window": 8},
        {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16},
        {},
    ),
}
"""Names of tensors of text, of vision, and of no part, by `model_type` of the whole model."""


@pytest.mark.default_cases(family=("gemma3", "qwen3_vl", "kimi_k25"))
@pytest.mark.parametrize("family", MULTIMODAL)
@torch.inference_mode()
def test_text_model_of_a_multimodal_checkpoint(family: str, tmp_path: Path) -> None:
    text, vision, rest = MULTIMODAL[family]
    config_class: Any = CONFIG_MAPPING[family]
    config = config_class(text_config=text, vision_config=vision, **rest)
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in whole.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    checkpoint = Checkpoint.open(tmp_path)
    client_part = load_client_part(checkpoint, LocalChain(load_spans(checkpoint)))
    ids = torch.randint(3, 280, (1, 20))
    assert_close(client_part(ids).logits, whole(ids).logits, 3e-5)
    assert ModelSizes.of(tmp_path).block_bytes == block_bytes(checkpoint, None)


@torch.inference_mode()
def test_a_separate_head_overrides_the_default_of_a_wrapper(tmp_path: Path) -> None:
    text, vision, _ = MULTIMODAL["mistral3"]
    config_class: Any = CONFIG_MAPPING["mistral3"]
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(config).eval()
    whole.lm_head.weight.normal_()
    whole.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]  # as in the published config; true by default
    (tmp_path / "config.json").write_text(json.dumps(values))
    checkpoint = Checkpoint.open(tmp_path)
    client_part = load_client_part(checkpoint, LocalChain(load_spans(checkpoint)))
    ids = torch.randint(3, 280, (1, 20))
    assert_close(client_part(ids).logits, whole(ids).logits, 3e-5)


@pytest.mark.default_cases(family=("qwen3_next",))
@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "nemotron_h"])
@torch.inference_mode()
def test_a_far_rewind_runs_earlier_positions_again(family: str, made: Callable[[Case], Path]) -> None:
    span = Span.load(Checkpoint.open(made(Case(family, HYBRIDS[family]))), 0, 6)
    torch.manual_seed(0)
    hidden = torch.randn(130, 64)
    expected = span.forward(hidden, [RowChunk(span.new_row(), 0, 130)])
    row = span.new_row()
    span.forward(hidden[:30], [RowChunk(row, 0, 30)])
    span.forward(hidden[30:130] + 1, [RowChunk(row, 30, 100)])
    fork = row.fork(25)
    row.crop(30)
    assert row.computed == 30, "a copy was made before the second step"
    row.crop(25)
    assert (row.computed, fork.computed) == (0, 0)
    assert span.catch_up(row, None, 11) == 11
    assert row.computed == 11
    for other in (row, fork):
        again = span.forward(hidden[25:120], [RowChunk(other, 25, 95)])
        assert_close(again, expected[25:120], 1e-4)
        assert (other.length, other.computed) == (120, 120)
    assert span.catch_up(row, None) == 0


@torch.inference_mode()
def test_a_row_moves_to_more_memory_in_the_middle_of_a_step(made: Callable[[Case], Path]) -> None:
    span = Span.load(Checkpoint.open(made(Case("jamba", HYBRIDS["jamba"]))), 0, 6)
    torch.manual_seed(0)
    hidden = torch.randn(40, 64)
    expected = span.forward(hidden, [RowChunk(span.new_row(), 0, 40)])
    row = span.new_row(16)
    span.forward(hidden[:10], [RowChunk(row, 0, 10)])
    row.room = 40
    assert_close(span.forward(hidden[10:], [RowChunk(row, 10, 30)]), expected[10:], 3e-5)


@pytest.mark.parametrize("path", ["mamba.dt_proj", "mamba.out_proj"])
def test_adapters_are_added_to_a_layer_or_refused(path: str, made: Callable[[Case], Path]) -> None:
    span = Span.load(Checkpoint.open(made(Case("jamba", HYBRIDS["jamba"]))), 0, 1)
    torch.manual_seed(0)
    layer: Any = span._backbone.get_submodule(f"layers.0.{path}")
    outputs, inputs = layer.weight.shape
    adapter = AdapterTensors({f"0.{path}.lora_A": torch.randn(2, inputs), f"0.{path}.lora_B": torch.randn(outputs, 2)})
    if path == "mamba.dt_proj":
        with pytest.raises(AdapterError, match=r"dt_proj.*leave it out"):
            span.fit_adapter(adapter)
        return
    span.fit_adapter(adapter)
    hidden = torch.randn(5, 64)
    plain, adapted = (span.forward(hidden, [RowChunk(span.new_row(), 0, 5, which)]) for which in (None, adapter))
    assert not torch.allclose(plain, adapted)


@pytest.mark.default_cases(weights=("int8",), family=("jamba",))
@pytest.mark.default_cases(weights=("int4",), family=("mamba",))
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_time_steps_keep_their_weights(family: str, weights: str, made: Callable[[Case], Path]) -> None:
    wide = HYBRIDS[family] | {"mamba_dt_rank" if family == "jamba" else "time_step_rank": 64}
    checkpoint = Checkpoint.open(made(Case(family, wide)))
    torch.manual_seed(0)
    hidden = torch.randn(9, 64)
    exact, held = (Span.load(checkpoint, 0, 1, weights=kind) for kind in (None, weights))
    layers = {
        path.rpartition(".")[2]
        for path, module in held._backbone.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert "in_proj" in layers and "dt_proj" not in layers
    outputs = [span.forward(hidden, [RowChunk(span.new_row(), 0, 9)]).float() for span in (exact, held)]
    assert (outputs[1] - outputs[0]).norm() < 0.4 * outputs[0].norm()


@pytest.mark.parametrize(("family", "reason"), [("qwen3_next", "keep states"), ("deepseek_v32", "choose positions")])
def test_unsupported_prefixes_are_refused(family: str, reason: str, made: Callable[[Case], Path]) -> None:
    span = Span.load(Checkpoint.open(made(Case(family, (HYBRIDS | SPARSE)[family]))), 0, 6)
    prefix = {f"2.{kind}": torch.zeros(2, 3, 16) for kind in (PREFIX_KEYS, PREFIX_VALUES)}
    with pytest.raises(AdapterError, match=rf"'{family}' {reason}.*LoRA"):
        span.fit_adapter(AdapterTensors(prefix))
    row = span.new_row()
    span.forward(torch.randn(3, 64), [RowChunk(row, 0, 3)])
    with pytest.raises(AdapterError, match="LoRA"):
        span.keys_and_values(row, 3)


@pytest.mark.default_cases(family=("llama", "mixtral"))
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_a_span_reads_only_its_shards(family: str, made: Callable[[Case], Path], tmp_path: Path) -> None:
    folder = made(Case(family))
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint.open(folder)
    needed = {shards[tensor.name] for index in (2, 3) for tensor in checkpoint.block_tensors[index]}
    assert len(needed) < len(set(shards.values()))
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial, ignore=lambda _, files: set(shards.values()).intersection(files) - needed)
    reported: list[tuple[int, int]] = []
    span = Span.load(Checkpoint.open(partial), 2, 4, progress=lambda done, total: reported.append((done, total)))
    hidden = torch.randn(3, 64)
    whole = Span.load(checkpoint, 2, 4)
    assert torch.equal(
        span.forward(hidden, [RowChunk(span.new_row(), 0, 3)]), whole.forward(hidden, [RowChunk(whole.new_row(), 0, 3)])
    )
    stored = sum(checkpoint.bytes_of((t.name for t in checkpoint.block_tensors[i]), None) for i in (2, 3))
    assert reported[-1] == (stored, stored)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert abs(span.weight_bytes - stored) < 1024  # the frequencies of a rotary embedding


def test_dtype_of_a_span(llama: Checkpoint) -> None:
    assert Span.load(llama, 0, 2).dtype == torch.float32
    span = Span.load(llama, 0, 2, dtype="bfloat16")
    output = span.forward(torch.randn(3, 64), [RowChunk(span.new_row(), 0, 3)])
    assert span.dtype == output.dtype == torch.bfloat16
    assert span.kv_bytes_per_position == 2 * 2 * (2 * 16) * 2  # keys and values, blocks, heads x head size, bytes
    assert block_bytes(llama, "bfloat16") * 2 == block_bytes(llama, None)
    with pytest.raises(ValueError, match="not a type of weights"):
        Span.load(llama, 0, 1, dtype="int8")


@pytest.mark.default_cases(family=("llama", "bloom"))
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "opt", "bloom"])
def test_a_view_runs_some_blocks_of_a_span(family: str, made: Callable[[Case], Path]) -> None:
    checkpoint = Checkpoint.open(made(Case(family)))
    span = Span.load(checkpoint, 1, 6)
    view, alone = span.view(2, 5), Span.load(checkpoint, 2, 5)
    hidden = torch.randn(12, 64)
    rows = view.new_row(), alone.new_row()
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        count = end - begin
        assert torch.equal(
            view.forward(hidden[begin:end], [RowChunk(rows[0], begin, count)]),
            alone.forward(hidden[begin:end], [RowChunk(rows[1], begin, count)]),
        )
    assert view.kv_bytes_per_position == alone.kv_bytes_per_position
    assert (view.start, view.end) == (2, 5)
    whole = span.forward(hidden, [RowChunk(span.new_row(), 0, 12)])
    chained = hidden
    for part in (span.view(1, 2), view, span.view(5, 6)):
        chained = part.forward(chained, [RowChunk(part.new_row(), 0, 12)])
    assert_close(chained, whole)
    with pytest.raises(ValueError, match="not within"):
        span.view(0, 3)


@pytest.mark.default_cases(case=STRUCTURES)
@pytest.mark.parametrize("case", [*CASES, *OTHER_CASES], ids=str)
@torch.inference_mode()
def test_taps_of_a_span_equal_outputs_of_its_parts(case: Case, made: Callable[[Case], Path]) -> None:
    """The steps are prompts, tokens and windows of two sequences, and steps after a rewind; the output comes last."""
    span = Span.load(Checkpoint.open(made(case)), 1, 6)
    chain = [span, *(span.view(start, end) for start, end in ((1, 3), (3, 4), (4, 6)))]
    rows = [[each.new_row() for each in chain] for _ in range(2)]
    noise = torch.Generator().manual_seed(0)
    for counts, back in (((17, 19), 0), ((1, 1), 0), ((3, 1), 0), ((2, 5), 12), ((1, 1), 0)):
        for row in (row for own in rows for row in own):
            row.crop(row.length - back)
        hidden = torch.randn(sum(counts), span.hidden_size, generator=noise)
        parts = [[RowChunk(own[at], own[at].length, n) for own, n in zip(rows, counts, strict=True)] for at in range(4)]
        got = span.forward(hidden, parts[0], (3, 4)).chunk(3, dim=1)
        for part, own, states in zip(chain[1:], parts[1:], got, strict=True):
            hidden = part.forward(hidden, own)
            assert_close(states, hidden, OWN_DIFFERENCE.get(case.family, STATES_TOLERANCE))


def test_spans_in_several_threads_do_not_meet(llama: Checkpoint) -> None:
    hidden = torch.randn(40, 64)
    spans = load_spans(llama)
    expected = [span.forward(hidden, [RowChunk(span.new_row(), 0, 40)]) for span in spans]
    barrier = threading.Barrier(len(spans))
    equal: list[bool] = []

    def work(span: Span, wanted: torch.Tensor) -> None:
        barrier.wait()
        for _ in range(20):
            equal.append(torch.equal(span.forward(hidden, [RowChunk(span.new_row(), 0, 40)]), wanted))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(spans, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 60


def test_parts_that_do_not_fit_are_refused(llama: Checkpoint) -> None:
    span = Span.load(llama, 0, 1)
    row = span.new_row()
    refused = [
        (torch.randn(2, 32), [RowChunk(row, 0, 2)]),
        (torch.randn(2, 64), [RowChunk(row, 0, 3)]),
        (torch.randn(2, 64), [RowChunk(row, 1, 2)]),
        (torch.randn(2, 64), [RowChunk(row, 0, 1), RowChunk(row, 0, 1)]),
        (torch.randn(0, 64), [RowChunk(row, 0, 0)]),
    ]
    for hidden, parts in refused:
        with pytest.raises(ValueError):
            span.forward(hidden, parts)
    assert row.length == 0
    with pytest.raises(ValueError, match="not within"):
        Span.load(llama, 3, 7)


def test_too_little_memory_says_how_many_blocks_fit(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda device: 2 * block_bytes(llama, None) + 100)
    with pytest.raises(OutOfMemory, match="at most 2 fit: use --blocks 1:3"):
        Span.load(llama, 1, 5)
    assert Span.load(llama, 1, 3).end == 3


def test_families_that_cannot_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    rwkv = RwkvForCausalLM(RwkvConfig(num_hidden_layers=2, hidden_size=16, vocab_size=30))
    rwkv.save_pretrained(tmp_path / "rwkv")
    with pytest.raises(UnsupportedModel, match=r"'rwkv'.*recurrent"):
        Checkpoint.open(tmp_path / "rwkv")
    t5 = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=16, d_kv=8, d_ff=16, num_heads=2, vocab_size=30))
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match=r"'t5'.*encoder-decoder"):
        Checkpoint.open(tmp_path / "t5")
    random_checkpoint("minimax", tmp_path / "minimax", layer_types=["linear_attention", "full_attention"] * 3)
    with pytest.raises(UnsupportedModel, match=r"'minimax'.*'linear_attention'"):
        Checkpoint.open(tmp_path / "minimax")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("zamba2", {"layers_block_type": ["linear_attention", "hybrid"] * 3}), "the same weights"),
        (Case("gemma3_text", {"use_bidirectional_attention": True}), "to later positions"),
        (Case("gemma4_text", SPARSE["gemma4_text"] | {"use_bidirectional_attention": "all"}), "to later positions"),
        (Case("deepseek_v4"), "several hidden states"),
        (
            Case("glm_moe_dsa", SPARSE["glm_moe_dsa"] | {"indexer_types": ["full", "full", "shared"] * 2}),
            "that the block before has chosen",
        ),
    ],
    ids=lambda value: value.family if isinstance(value, Case) else "",
)
def test_blocks_that_take_more_than_former_positions_are_refused(case: Case, reason: str) -> None:
    config = random_config(case.family, blocks=6, hidden=64, vocab=300, **case.overrides)
    with pytest.raises(UnsupportedModel, match=f"{case.family!r}.*{reason}"):
        check_can_be_cut(config)


def test_a_family_that_does_more_than_its_blocks_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("ctrl", tmp_path))  # scales embeddings and adds positions
    with pytest.raises(UnsupportedModel, match=r"'ctrl'.*outside their blocks"):
        Span.load(checkpoint, 0, 2)
