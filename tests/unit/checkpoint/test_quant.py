"""Checkpoints with quantized weights are read as the numbers that they encode, or refused by name."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from splitnet.blocks.backbone import load_whole
from splitnet.blocks.client_part import check_all_is_taken
from splitnet.blocks.span import RowChunk, Span, block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.quant.format import Part as FilePart
from splitnet.checkpoint.quant.integers import Mlx
from splitnet.errors import UnsupportedModel
from splitnet.quant.experts import QuantizedExperts
from splitnet.quant.packed_tensor import PackedTensor, unpack_words
from tests.unit.quantized_checkpoints import (
    SCHEMES,
    Scheme,
    mlx,
    mlx_settings,
    pack_words,
    quantized_pair,
    tensors_of,
    write_checkpoint,
)
from tests.unit.random_models import random_checkpoint

BITS = {
    **dict.fromkeys(("fp8", "fp8-bfloat16", "fp8-tensor", "fp8-weight_scale", "mxfp8", "fbgemm_fp8"), 8),
    **dict.fromkeys(("int-quantized", "int-quantized-zeros", "int8-channel-bfloat16", "naive-quantized"), 8),
    **dict.fromkeys(("float-quantized", "float-quantized-tensor", "float-quantized-block", "mxfp8-compressed"), 8),
    **dict.fromkeys(("gptq-8-bits", "int8-bitsandbytes"), 8),
    **dict.fromkeys(("int3-group", "gptq-3-bits"), 3),
    "mlx-2": 2,
    "mlx-3": 3,
    "mlx-5": 5,
    "mlx-6": 6,
    "mlx-8": 8,
    "mlx-mxfp8": 8,
}
"""Bits of the layout, if not 4."""
ROUNDED = ("int8-channel-bfloat16", "nvfp4")
"""The defining library rounds the decoded numbers of these schemes to bfloat16; splitnet does not."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "llama": random_checkpoint("llama", folder / "llama", blocks=3, hidden=128),
        "gpt_oss": random_checkpoint("gpt_oss", folder / "gpt_oss", blocks=2, hidden=64),
    }


@pytest.mark.default_cases(
    name=(
        *("fp8", "fp8-tensor", "fbgemm_fp8", "mxfp4", "mxfp8", "nvfp4", "int4-group", "int-quantized-zeros"),
        *("float-quantized", "gptq", "gptq-3-bits", "awq", "nf4", "mlx-4", "modelopt-nvfp4"),
    )
)
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_decode_as_the_format_says(
    name: str, sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = sources["gpt_oss" if name == "mxfp4" else "llama"]
    folder, plain_folder = quantized_pair(source, tmp_path, name)
    checkpoint, plain = Checkpoint.open(folder), Checkpoint.open(plain_folder)
    expected = tensors_of(plain_folder)
    assert set(checkpoint.store.tensor_names) == set(expected)
    assert checkpoint.dtype == torch.float32
    facts = checkpoint.store.tensor_facts(checkpoint.store.tensor_names)
    sizes = {part.name: part.stat().st_size for part in folder.glob("*.safetensors")}
    assert 0.8 * sum(sizes.values()) < sum(fact.nbytes for fact in facts.values()) < sum(sizes.values())
    with caplog.at_level(logging.WARNING):
        loading = checkpoint.store.load_tensors({key: key for key in checkpoint.store.tensor_names}, torch.float32)
        with loading as lazy:
            read = {key: lazy[key][...] for key in checkpoint.store.tensor_names}
    coded = {key for key, tensor in read.items() if isinstance(tensor, PackedTensor)}
    assert bool(coded) is (name != "gptq-desc_act")
    assert ("as numbers they take" in caplog.text) is (name == "gptq-desc_act")
    for key, tensor in read.items():  # after the files were closed
        fact = facts[key]
        assert (fact.shape, fact.dtype) == (tuple(tensor.shape), torch.float32)
        if isinstance(tensor, PackedTensor):
            assert fact.layout is not None and fact.layout == tensor.experts[0][0].layout
            assert fact.layout.bits == BITS.get(name, 4)
            matrices = [matrix for matrices in tensor.experts for matrix in matrices]
            in_layout = sum(fact.layout.nbytes(*matrix.shape) for matrix in matrices)
            assert in_layout >= 0.7 * fact.nbytes - 2000
            tensor = tensor.to_floats()
        torch.testing.assert_close(tensor, expected[key], rtol=8e-3 if name in ROUNDED else 1e-6, atol=1e-7)
    assert checkpoint.fingerprint != plain.fingerprint

    if name in ROUNDED:
        return
    span, whole = (Span.load(each, 0, each.num_blocks, weights="float32") for each in (checkpoint, plain))
    hidden = torch.randn(5, checkpoint.hidden_size)
    found, wanted = (each.forward(hidden, [RowChunk(each.new_row(), 0, 5)]) for each in (span, whole))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3  # kernels round activations to 16 bits


def _with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("scheme", "changes", "said"),
    [
        ("fp8", {"quant_method": "higgs"}, "'higgs'"),
        ("fp8", {"quant_method": None}, "does not name"),
        ("int4-group", {"format": "marlin-24"}, "'marlin-24'"),
        ("int4-group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ("int4-group", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("int4-group", {"config_groups": {}}, "does not say clearly"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("awq", {"version": "gemv"}, "'gemv'"),
        ("awq", {"bits": 8}, "'bits'"),
        ("modelopt-nvfp4", {"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'"),
        ("gptq", {"quant_method": "quark"}, "'quark'"),
        ("auto-round", {"packing_format": "auto_round:exllamav2"}, "'exllamav2'"),
        ("auto-round", {"data_type": "mx_fp"}, "'mx_fp'"),
        ("mlx-4", {"mode": "affine-2"}, "'affine-2'"),
        ("mlx-4", {"bits": 8}, "8 bits in groups of 64"),
        ("mlx-4", {"group_size": 32}, "groups of 32"),
        ("mlx-4", {"group_size": 10**12}, "group_size"),
        ("mlx-4", {"model.layers.0.mlp.up_proj": False}, r"layers\.0\.mlp\.up_proj"),
        ("mlx-mxfp4", {"mode": "affine"}, "biases"),
        ("nf4", {"load_in_4bit": False}, "absmax|without its scales"),
        ("int4-group", {"config_groups": ["Linear"]}, "does not say clearly"),
        ("int4-group", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"bits": 4}}}}, "num_bits"),
        ("fp8", {"weight_block_size": "128"}, "up_proj|down_proj|gate_proj|_proj"),
        ("int4-channel", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 5}}}}, "does not fit"),
    ],
)
def test_unknown_options_are_refused_by_name(
    scheme: str, changes: dict[str, Any], said: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = _with_config(quantized_pair(sources["llama"], tmp_path, scheme)[0], **changes)
    with pytest.raises(UnsupportedModel, match=said):
        Span.load(Checkpoint.open(folder), 0, 1)


@pytest.mark.parametrize(
    ("scheme", "lost"),
    [("fp8", "_scale_inv"), ("fp8", ""), ("int4-group", "_scale"), ("int4-group", "_packed"), ("nf4", ".absmax")],
)
def test_a_weight_that_lacks_a_part_is_refused_by_name(
    scheme: str, lost: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = quantized_pair(sources["llama"], tmp_path, scheme)
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight" + lost]
    config = json.loads((folder / "config.json").read_text())
    broken = write_checkpoint(tmp_path / "broken", folder, tensors, config)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj"):
        Span.load(Checkpoint.open(broken), 1, 2)


def test_a_damaged_description_is_refused_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = quantized_pair(sources["llama"], tmp_path, "nf4")
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = tensors[name][:-1]
    broken = write_checkpoint(tmp_path / "broken", folder, tensors, json.loads((folder / "config.json").read_text()))
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj"):
        Span.load(Checkpoint.open(broken), 1, 2)


MISFITS = [
    ("fp8", "weight_scale_inv", lambda scale: scale.repeat(2, 1)),
    ("fp8", "weight_scale_inv", lambda scale: scale[:, :-1]),
    ("fp8", "weight_scale_inv", lambda scale: scale[:0]),
    ("gptq", "scales", lambda scales: scales[:, :0]),
    ("float-quantized-block", "weight_scale", lambda scale: scale[:1]),
    ("int-quantized", "weight_scale", lambda scale: scale[:8]),
    ("int-quantized-zeros", "weight_zero_point", lambda zero: None),
    ("int-quantized-zeros", "weight_zero_point", lambda zero: zero[:8]),
    ("int-quantized", "weight_g_idx", lambda none: torch.arange(128, dtype=torch.int32).flip(0) // 64),
    ("int4-zeros", "weight_zero_point", lambda zero: zero[:-1]),
    ("int4-zeros", "weight_zero_point", lambda zero: zero.repeat(1, 2)),
    ("nvfp4", "weight_global_scale", lambda scale: torch.cat((scale, scale + 1))),
    ("modelopt-nvfp4", "weight_scale_2", lambda scale: torch.stack((scale, scale + 1))),
    ("gptq", "g_idx", lambda index: index[:64]),
    ("gptq-desc_act", "g_idx", lambda index: None),
    ("gptq-desc_act", "g_idx", lambda index: index[:1]),
    ("gptq-desc_act", "g_idx", lambda index: index + 9),
    ("nf4-nested", "weight.nested_absmax", lambda maxima: None),
    ("nf4-nested", "weight.nested_quant_map", lambda table: table[:128]),
    ("nf4-nested", "weight.absmax", lambda maxima: maxima.float()),
    ("nf4", "weight.quant_map", lambda table: table[:1]),
]


@pytest.mark.parametrize(("scheme", "part", "change"), MISFITS)
def test_parts_that_do_not_belong_together_are_refused_by_name(
    scheme: str, part: str, change: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    """A wrong part would still decode to a plausible weight."""
    folder, _ = quantized_pair(sources["llama"], tmp_path, scheme)
    tensors = tensors_of(folder)
    name = f"model.layers.1.mlp.down_proj.{part}"
    changed = change(tensors.pop(name, None))
    config = json.loads((folder / "config.json").read_text())
    tensors |= {} if changed is None else {name: changed}
    broken = write_checkpoint(tmp_path / "broken", folder, tensors, config)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.down_proj"):
        Span.load(Checkpoint.open(broken), 1, 2)


@pytest.mark.parametrize("scheme", ["gptq", "awq", "nf4", "modelopt-nvfp4", "fp8"])
def test_a_whole_model_needs_none_of_the_packages_that_wrote_it(
    scheme: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Such a model drafts tokens for a swarm."""
    folder, plain = quantized_pair(sources["llama"], tmp_path, scheme)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found = load_whole(Checkpoint.open(folder), "auto")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_in_all_bits_and_groups(bits: int, group: int) -> None:
    stored, expected = mlx(bits, group)("a.weight", torch.empty(6, 256))
    parts = {
        role: FilePart(f"a.{role}", tuple(one.shape), one.dtype, one.__getitem__)
        for role, one in zip(("weight", "scales", "biases"), stored.values(), strict=True)
    }
    weight = Mlx(mlx_settings(bits, group), "llama").tensor("a.weight", parts, torch.float32)
    torch.testing.assert_close(weight.to_floats(), expected)


def test_mlx_may_quantize_layers_in_different_ways(sources: dict[str, Path], tmp_path: Path) -> None:
    expected, stored = tensors_of(sources["llama"]), dict[str, torch.Tensor]()
    own = {"model.layers.1.mlp.down_proj": mlx_settings(8, 32), "model.layers.0.self_attn.o_proj": False}
    for name, value in expected.items():
        settings = own.get(name.removesuffix(".weight"), value.ndim == 2)
        if settings:
            parts, expected[name] = (mlx(8, 32) if settings is not True else mlx(4, 64))(name, value)
            stored |= parts
        else:
            stored[name] = value
    config = json.loads((sources["llama"] / "config.json").read_text())
    folder = write_checkpoint(
        tmp_path / "it", sources["llama"], stored, config | {"quantization": mlx_settings(4, 64) | own}
    )
    plain = write_checkpoint(tmp_path / "plain", sources["llama"], expected, config)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        found = load_whole(Checkpoint.open(folder), "auto")(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted)
    check_all_is_taken(Checkpoint.open(folder))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "minimax_m2"])
def test_experts_of_mlx_are_stacked(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = random_checkpoint(family, tmp_path / "source", blocks=2, hidden=64)
    expected, stored = tensors_of(source), dict[str, torch.Tensor]()
    stacks: dict[str, dict[int, str]] = {}
    for name in expected:
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            path = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(match[3], match[3])
            stacks.setdefault(f"{match[1]}.switch_mlp.{path}.weight", {})[int(match[2])] = name
    for name, members in stacks.items():
        parts, values = mlx(4, 32)(name, torch.stack([expected[members[one]] for one in range(len(members))]))
        stored |= parts
        expected |= {members[one]: value.clone() for one, value in enumerate(values)}
    assert stacks
    alone = {
        name: one for name, one in expected.items() if not any(name in members.values() for members in stacks.values())
    }
    config = json.loads((source / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "it", source, stored | alone, config | {"quantization": mlx_settings(4, 32)})
    checkpoint = Checkpoint.open(folder)
    check_all_is_taken(checkpoint)
    plain = Checkpoint.open(write_checkpoint(tmp_path / "plain", source, expected, config))
    span, whole = Span.load(checkpoint, 0, 2), Span.load(plain, 0, 2)
    assert any(isinstance(one, QuantizedExperts) for one in span._backbone.modules())
    hidden = torch.randn(5, 64)
    found, wanted = (each.forward(hidden, [RowChunk(each.new_row(), 0, 5)]) for each in (span, whole))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3


def test_mlx_of_families_that_it_changes_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint("qwen3_next", tmp_path / "it", blocks=3)
    config = json.loads((folder / "config.json").read_text()) | {"quantization": mlx_settings(4, 64)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"MLX.*'qwen3_next'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-weight_scale", "modelopt-nvfp4", "mlx-4"])
def test_scales_without_a_config_are_not_the_fault_of_the_tensors(
    scheme: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Without scales they would be loaded as weights with other values."""
    folder, _ = quantized_pair(sources["llama"], tmp_path, scheme)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="config does not say"):
        check_all_is_taken(Checkpoint.open(folder))
    with pytest.raises(UnsupportedModel, match="config does not say"):
        Span.load(Checkpoint.open(folder), 0, 1)


def test_numbers_of_codes_are_rounded_once(sources: dict[str, Path], tmp_path: Path) -> None:
    folder, plain = quantized_pair(sources["llama"], tmp_path, "gptq-desc_act")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    name = "model.layers.1.mlp.down_proj.weight"
    with Checkpoint.open(folder).store.load_tensors({name: name}, torch.float32) as read:
        torch.testing.assert_close(read[name][...], tensors_of(plain)[name], rtol=1e-6, atol=1e-7)
    span, whole = (Span.load(Checkpoint.open(one), 1, 2, dtype="float32") for one in (folder, plain))
    hidden = torch.randn(5, 128)
    found, wanted = (each.forward(hidden, [RowChunk(each.new_row(), 0, 5)]) for each in (span, whole))
    torch.testing.assert_close(found, wanted)


def test_zeros_that_the_config_denies_are_an_error(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = _with_config(quantized_pair(sources["llama"], tmp_path, "gptq")[0], sym=True)
    with pytest.raises(UnsupportedModel, match=r"qzeros.*symmetric"):
        Span.load(Checkpoint.open(folder), 0, 1)


def test_a_permutation_that_the_config_denies_is_an_error(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = _with_config(quantized_pair(sources["llama"], tmp_path, "gptq-desc_act")[0], desc_act=False)
    with pytest.raises(UnsupportedModel, match=r"g_idx.*permutes"):
        Span.load(Checkpoint.open(folder), 0, 1)


def test_layers_may_be_quantized_in_different_ways(sources: dict[str, Path], tmp_path: Path) -> None:
    int4, float8 = SCHEMES["int4-group"], SCHEMES["float-quantized"]
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, weight in tensors_of(sources["llama"]).items():
        if ".layers." not in name or weight.ndim < 2:
            stored[name] = expected[name] = weight
            continue
        parts, expected[name] = (int4 if "mlp" in name else float8).write(name, weight)
        stored |= parts
    groups = {
        "group_0": {"format": "pack-quantized", "targets": [r"re:.*mlp\.\w+_proj$"]},
        "group_1": {"format": "float-quantized", "targets": ["Linear"]},
    }
    for group, scheme in zip(groups.values(), (int4, float8), strict=True):
        group["weights"] = scheme.settings["config_groups"]["group_0"]["weights"]
    config = json.loads((sources["llama"] / "config.json").read_text())
    config["quantization_config"] = {**int4.settings} | {"format": "mixed-precision", "config_groups": groups}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "mixed", sources["llama"], stored, config))
    with checkpoint.store.load_tensors({name: name for name in checkpoint.store.tensor_names}, torch.float32) as lazy:
        for name, tensor in expected.items():
            read = lazy[name][...]
            torch.testing.assert_close(read.to_floats() if isinstance(read, PackedTensor) else read, tensor)


@given(bits=st.integers(1, 8), rows=st.integers(1, 3), columns=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_words_are_unpacked(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, columns).long(), codes)


def test_groups_of_permuted_inputs(sources: dict[str, Path], tmp_path: Path) -> None:
    """compressed-tensors stored them like this until 2026 ("actorder": "group")."""
    folder, _ = quantized_pair(sources["llama"], tmp_path, "int4-zeros")
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    arguments = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    packed, zeros = tensors[name + "_packed"], tensors[name + "_zero_point"]
    codes = unpack_from_int32(packed, 4, torch.Size((256, 128))).float()
    shift = unpack_from_int32(zeros, 4, torch.Size((256, 4)), packed_dim=0).float()
    order = torch.arange(128) // arguments["group_size"]
    for index, coded in ((order, True), (torch.full((128,), -1), True), (order[torch.randperm(128)], False)):
        stored = tensors | {name + "_g_idx": index.int()}
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path / str(index.tolist()[:9]), folder, stored, config))
        assert (checkpoint.store.tensor_facts([name])[name].layout is not None) is coded
        with checkpoint.store.load_tensors({name: name}, torch.float32) as lazy:
            read = lazy[name][...]
        assert isinstance(read, PackedTensor) is coded
        of = order if coded else index
        expected = (codes - shift[:, of]) * tensors[name + "_scale"][:, of]
        torch.testing.assert_close(read.to_floats() if isinstance(read, PackedTensor) else read, expected)


def test_fp8_experts_and_blocks_that_do_not_come_out_even(tmp_path: Path) -> None:
    """DeepSeek-V3: 128 x 128 blocks, a projection with 576 outputs, and separate tensors per expert in the file."""
    source = random_checkpoint(
        "deepseek_v3",
        tmp_path / "source",
        blocks=2,
        hidden=128,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        head_dim=16,
        v_head_dim=16,
        num_key_value_heads=4,
    )
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in tensors_of(source).items():
        stored[name] = plain[name] = weight
        if not name.endswith("_proj.weight"):
            continue
        outputs, inputs = weight.shape
        scales = torch.rand(-(-outputs // 48), -(-inputs // 64)) / 100
        codes = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
        stored |= {name: codes, name + "_scale_inv": scales}
        plain[name] = codes.float() * scales.repeat_interleave(48, 0)[:outputs].repeat_interleave(64, 1)[:, :inputs]
    config = json.loads((source / "config.json").read_text())
    described = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 64]}}
    folders = [
        write_checkpoint(tmp_path / "quantized", source, stored, config | described),
        write_checkpoint(tmp_path / "plain", source, plain, config),
    ]
    spans = [Span.load(Checkpoint.open(folder), 0, 2) for folder in folders]
    hidden = torch.randn(5, 128)
    outputs = [span.forward(hidden, [RowChunk(span.new_row(), 0, 5)]) for span in spans]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [None, "int4"])
def test_codes_across_the_inputs_of_experts_become_numbers(
    weights: str | None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss has experts `[experts, inputs, outputs]`, and FP8 codes have the order of the tensor."""
    fp8 = SCHEMES["fp8"]
    monkeypatch.setitem(SCHEMES, "across", Scheme(fp8.settings, fp8.write, only="experts."))
    folders = quantized_pair(sources["gpt_oss"], tmp_path, "across")
    spans = [Span.load(Checkpoint.open(folder), 0, 2, weights=weights) for folder in folders]
    hidden = torch.randn(5, 64)
    outputs = [span.forward(hidden, [RowChunk(span.new_row(), 0, 5)]) for span in spans]
    torch.testing.assert_close(*outputs)
    foretold = block_bytes(Checkpoint.open(folders[0]), None, weights)
    assert abs(spans[0].weight_bytes - 2 * foretold) < 1024


def test_stacked_experts_have_stacked_scales(tmp_path: Path, sources: dict[str, Path]) -> None:
    config = json.loads((sources["llama"] / "config.json").read_text())
    stored = tensors_of(sources["llama"])
    codes = torch.randn(4, 64, 128).to(torch.float8_e4m3fn)
    wide, one = torch.rand(4, 2, 2), torch.rand(4)
    stored |= {"a.experts.up": codes, "a.experts.up_scale_inv": wide, "b.experts.up": codes.clone()}
    stored |= {"b.experts.up_scale_inv": one}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 64]}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "stacked", sources["llama"], stored, config))
    with checkpoint.store.load_tensors({"a": "a.experts.up", "b": "b.experts.up"}, torch.float32) as lazy:
        a, b = lazy["a"][...], lazy["b"][...]
    assert isinstance(a, PackedTensor) and isinstance(b, PackedTensor) and a.stacked and len(a.experts) == 4
    torch.testing.assert_close(a.to_floats(), codes.float() * wide.repeat_interleave(32, 1).repeat_interleave(64, 2))
    torch.testing.assert_close(b.to_floats(), codes.float() * one[:, None, None])


def test_fp8_in_a_multimodal_wrapper(tmp_path: Path, sources: dict[str, Path]) -> None:
    """The root of its config, not the text model's config, declares the quantization."""
    folder, plain_folder = quantized_pair(sources["llama"], tmp_path, "fp8-tensor")
    text = json.loads((folder / "config.json").read_text())
    quantization = text.pop("quantization_config")
    wrapped: dict[str, Path] = {}
    for name, source in (("quantized", folder), ("plain", plain_folder)):
        tensors = {f"language_model.{key}": tensor for key, tensor in tensors_of(source).items()}
        tensors["vision_tower.patch_conv.weight"] = torch.randn(8, 3, 4, 4)
        tensors["multi_modal_projector.linear_1.weight"] = torch.randn(8, 8)
        config = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]}
        config |= {"text_config": text, "vision_config": {"model_type": "pixtral"}}
        config |= {"quantization_config": quantization} if name == "quantized" else {}
        wrapped[name] = write_checkpoint(tmp_path / "wrapped" / name, source, tensors, config)
    checkpoints = {name: Checkpoint.open(path) for name, path in wrapped.items()}
    assert checkpoints["quantized"].multimodal and checkpoints["quantized"].dtype == torch.float32
    spans = [Span.load(checkpoint, 0, 3) for checkpoint in checkpoints.values()]
    hidden = torch.randn(5, 128)
    outputs = [span.forward(hidden, [RowChunk(span.new_row(), 0, 5)]) for span in spans]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_the_type_that_a_config_gives_of_codes_is_not_what_blocks_compute_in(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    folder, _ = quantized_pair(sources["llama"], tmp_path, "fp8")
    config = json.loads((folder / "config.json").read_text())
    for dtype in ("float8_e4m3fn", None):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.dtype in (torch.float32, torch.bfloat16)
        assert checkpoint.store.tensor_facts(["model.layers.0.mlp.up_proj.weight"]).popitem()[1].dtype == torch.bfloat16
