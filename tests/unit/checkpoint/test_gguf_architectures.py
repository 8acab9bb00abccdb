"""Models in GGUF files, of every family, against plain transformers on the same weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, PreTrainedModel

import splitnet
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.checkpoint.gguf.gguf_store import GgufStore
from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.quant.packed_tensor import PackedTensor
from splitnet.serve.prompts import Prompts
from tests.unit.gguf_writing import write_gguf
from tests.unit.random_models import random_checkpoint

LATENT = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "first_k_dense_replace": 2,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
DELTA = {
    "blocks": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": 96,
    "head_dim": 32,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
GPT_OSS_YARN = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
CONV = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
MAMBA_BLOCKS = ["linear_attention", "moe", "full_attention", "linear_attention", "mlp", "linear_attention"]
MAMBA = {
    "layers_block_type": MAMBA_BLOCKS,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 96,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "shared_intermediate_size": 96,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
    "position_embedding_type": "nope",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA_3, "max_position_embeddings": 131_072}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_next": ("qwen3_next", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA),
    "gpt_oss": ("gpt_oss", {"rope_parameters": GPT_OSS_YARN}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"original_max_position_embeddings": 256}),
    "lfm2": ("lfm2", {"layer_types": CONV, "block_auto_adjust_ff_dim": False}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "glm4_moe": ("glm4_moe", {"first_k_dense_replace": 1, "n_routed_experts": 4, "use_qk_norm": True}),
    "nemotron_h": ("nemotron_h", MAMBA),
    "granitemoehybrid": ("granitemoehybrid", HYBRID),
    "llama4": ("llama4_text", {"intermediate_size_mlp": 96}),
    "minimax_m2": ("minimax_m2", {"rotary_dim": 8}),
}
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
KEPT_AS_FLOATS = re.compile("norm|conv1?d?\\.|kv_b_proj|gate\\.weight|router|shared_expert_gate|bias|A_log|\\.D$|sinks")


def load(store: GgufStore) -> PreTrainedModel:
    """The whole model, loaded by transformers itself."""
    config = store.config
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    with store.load_tensors({name: name for name in store.tensor_names}, torch.float32, None) as tensors:
        loaded, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    assert not any(report.values()), report
    return loaded.eval()


def dequantised(path: Path) -> Path:
    """A copy of a file with all tensors as float32 numbers."""
    reader = gguf.GGUFReader(path)
    copy = path.with_name(f"{path.stem}-F32.gguf")
    writer = gguf.GGUFWriter(copy, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.default_cases(
    case=("llama", "llama-3.1", "qwen3_moe", "qwen3_next", "gpt_oss", "gemma3", "deepseek_v3", "nemotron_h")
)
@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_outputs_of_its_source(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = random_checkpoint(family, tmp_path / "checkpoint", **overrides)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    store = GgufStore(write_gguf(folder, tmp_path / "model.gguf"))
    assert store.config.model_type == family
    torch.testing.assert_close(logits(load(store)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.default_cases(
    case=("llama", "llama-3.1", "qwen3_moe", "qwen3_next", "gpt_oss", "gemma3", "deepseek_v3", "nemotron_h")
)
@pytest.mark.parametrize("case", CASES)
def test_codes_are_kept_and_decode_as_in_gguf(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = random_checkpoint(family, tmp_path / "checkpoint", **overrides)
    stored = Type.MXFP4 if family == "gpt_oss" else Type.Q4_1
    path = write_gguf(folder, tmp_path / "model.gguf", stored)
    store = GgufStore(path)
    names = [name for name in store.tensor_names if not KEPT_AS_FLOATS.search(name)]
    with store.load_tensors({name: name for name in names}, torch.float32, None) as tensors:
        for name, facts in store.tensor_facts(names).items():
            tensor = tensors[name][...]
            assert isinstance(tensor, PackedTensor) and facts.layout is not None, name
            assert tuple(tensor.shape) == facts.shape, name
    expected = logits(load(GgufStore(dequantised(path))))
    torch.testing.assert_close(logits(load(store)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.default_cases(stored=(Type.Q4_K,))
@pytest.mark.parametrize("stored", [Type.Q4_K, Type.Q6_K])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
def test_k_quants(family: str, stored: Type, tmp_path: Path) -> None:
    sizes = DELTA | {"linear_value_head_dim": 64} if family == "qwen3_next" else {}
    folder = random_checkpoint(family, tmp_path / "checkpoint", hidden=256, **({"blocks": 2} | sizes))
    path = write_gguf(folder, tmp_path / "model.gguf", stored)
    store = GgufStore(path)
    bits = {facts.layout.bits for facts in store.tensor_facts(store.tensor_names).values() if facts.layout is not None}
    assert (4 if stored is Type.Q4_K else 6) in bits
    expected = logits(load(GgufStore(dequantised(path))))
    torch.testing.assert_close(logits(load(store)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(Type.BF16, torch.bfloat16), (Type.F16, torch.float16), (Type.F32, torch.float32), (Type.Q8_0, torch.float32)],
)
def test_a_mixture_has_the_type_of_its_experts(stored: Type, expected: torch.dtype, tmp_path: Path) -> None:
    folder = random_checkpoint("qwen3_moe", tmp_path / "model", blocks=2)
    path = write_gguf(folder, tmp_path / "it.gguf", stored)
    types = {tensor.stored for name, tensor in GgufFile(path).tensors.items() if "ffn_gate_inp" in name}
    assert types == {Type.F32}, "as converters write routers"
    assert Checkpoint.open(path).dtype == expected


def test_a_split_file_is_one_checkpoint(tmp_path: Path) -> None:
    folder = random_checkpoint("qwen2", tmp_path / "checkpoint")
    whole = Checkpoint.open(write_gguf(folder, tmp_path / "model.gguf", Type.Q8_0))
    first = write_gguf(folder, tmp_path / "split.gguf", Type.Q8_0, split=20)
    assert first.name == "split-00001-of-00004.gguf"
    parts = Checkpoint.open(first)
    assert parts.fingerprint == whole.fingerprint and set(parts.store.tensor_names) == set(whole.store.tensor_names)
    third = tmp_path / "split-00003-of-00004.gguf"
    shutil.copy(third, tmp_path / "alone.gguf")
    with pytest.raises(UnsupportedModel, match=r"alone\.gguf is part 3 of 4 by its contents"):
        Checkpoint.open(tmp_path / "alone.gguf")
    third.unlink()
    with pytest.raises(ModelNotFound, match=r"split-00003-of-00004\.gguf is missing"):
        Checkpoint.open(first)
    shutil.copy(first, third)
    with pytest.raises(UnsupportedModel, match=r"split-00003-of-00004\.gguf is part 1 of 4 by its contents"):
        Checkpoint.open(first)
    for name in ("twice-00001-of-00002.gguf", "twice-00002-of-00002.gguf"):
        shutil.copy(tmp_path / "model.gguf", tmp_path / name)
    with pytest.raises(UnsupportedModel, match=r"twice-00002-of-00002\.gguf has .* before it has too"):
        Checkpoint.open(tmp_path / name)


def test_a_folder_without_a_config_stands_for_the_only_file_in_it(tmp_path: Path) -> None:
    checkpoint, folder = random_checkpoint("llama", tmp_path / "checkpoint", blocks=1), tmp_path / "folder"
    folder.mkdir()
    file = write_gguf(checkpoint, folder / "model.gguf", Type.Q8_0)
    opened = Checkpoint.open(folder)
    assert (opened.source, opened.name) == (str(file), Checkpoint.open(file).name)
    (folder / "other.gguf").hardlink_to(file)
    with pytest.raises(ModelNotFound, match=f"holds 2 GGUF files: give one of them, such as {file}"):
        Checkpoint.open(folder)
    shutil.copy(checkpoint / "config.json", folder)
    with pytest.raises(ModelNotFound, match="holds no safetensors"):
        assert Checkpoint.open(folder)


def test_a_rotary_embedding_that_is_scaled_twice_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "checkpoint", blocks=1, rope_parameters=LLAMA_3)
    twice = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}
    path = write_gguf(folder, tmp_path / "model.gguf", **twice)
    with pytest.raises(UnsupportedModel, match=r"scales its rotary embedding twice \(linear, and by rope_freqs"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_count", 1, r"blk\.1\..* has 1 blocks"),
        ("attention__head_count", 0, "do not describe a model"),
        ("attention__head_count", 7, "do not describe a model"),
        ("attention__layer_norm_rms_epsilon", "small", "do not describe a model"),
        ("attention__head_count_kv", 3, r"blk\.0\.attn_k\.weight .* does not fit the file's metadata"),
    ],
)
def test_metadata_that_do_not_fit_the_tensors(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "checkpoint", blocks=2, hidden=128)
    path = write_gguf(folder, tmp_path / "model.gguf", Type.Q8_0, **{key: value})
    with pytest.raises(UnsupportedModel, match=said):
        Span.load(Checkpoint.open(path), 0, 1)


def test_more_blocks_than_tensors_where_these_tell_the_kinds_of_blocks(tmp_path: Path) -> None:
    folder = random_checkpoint("qwen3_next", tmp_path / "checkpoint", **DELTA)
    path = write_gguf(folder, tmp_path / "model.gguf", block_count=5)
    with pytest.raises(UnsupportedModel, match=r"do not describe a model .*block 4 has none of"):
        Checkpoint.open(path)


def test_another_type_of_weights_is_another_checkpoint(tmp_path: Path) -> None:
    folder = random_checkpoint("qwen2", tmp_path / "checkpoint")
    paths = [write_gguf(folder, tmp_path / f"{stored.name}.gguf", stored) for stored in (Type.Q8_0, Type.Q4_0)]
    eight, four = (Checkpoint.open(path) for path in paths)
    assert eight.fingerprint != four.fingerprint
    assert four.bytes_of(four.store.tensor_names, None) < eight.bytes_of(eight.store.tensor_names, None)


def test_unknown_metadata_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "checkpoint")
    path = write_gguf(folder, tmp_path / "key.gguf", attention__clamp_kqv=2.0)
    with pytest.raises(UnsupportedModel, match=r"llama\.attention\.clamp_kqv"):
        Checkpoint.open(path)

    def written(name: str, architecture: str, tensor: str) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_block_count(1)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        for each in ("token_embd.weight", tensor):
            writer.add_tensor(each, torch.ones(4, 64).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_mystery\.weight"):
        Checkpoint.open(written("tensor.gguf", "llama", "blk.0.attn_mystery.weight"))
    with pytest.raises(UnsupportedModel, match=r"architecture 'rwkv7'"):
        Checkpoint.open(written("architecture.gguf", "rwkv7", "blk.0.attn_norm.weight"))


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no file .*absent\.gguf"):
        Checkpoint.open(tmp_path / "absent.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UnsupportedModel, match=r"broken\.gguf is not a complete GGUF file"):
        Checkpoint.open(broken)
    whole = write_gguf(random_checkpoint("qwen2", tmp_path / "checkpoint"), tmp_path / "model.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-4096])
    with pytest.raises(UnsupportedModel, match=r"cut\.gguf is not a complete GGUF file"):
        Checkpoint.open(cut)


@pytest.mark.parametrize("names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_the_marks_around_a_gap_that_a_file_names(names: Sequence[str], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<end>", "a", "b", "<p>", "<s>", "<m>", "bb"])
    writer.add_token_types([3, 1, 1, 3, 3, 3, 1])
    writer.add_token_merges(["b b"])
    for token, name in enumerate(names, start=3):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_tensor("token_embd.weight", torch.ones(7, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    prompts = Prompts(GgufStore(tmp_path / "model.gguf").tokenizer(), 7, 64)
    assert prompts.tokens_of_gap("ab", "bb") == [3, 1, 2, 4, 6, 5] and prompts.infill_ends == {3, 4, 5}


def test_the_tokenizer_of_a_file_and_another(tmp_path: Path) -> None:
    def written(split: str) -> Path:
        writer = gguf.GGUFWriter(tmp_path / f"{split}.gguf", "qwen2")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(["<end>", "a", "b", "1", "2", "Ġ", "ab", "12"])
        writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1])
        writer.add_token_merges(["a b", "1 2"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages[0]['content'] }}<end>")
        writer.add_tensor("token_embd.weight", torch.ones(8, 64).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / f"{split}.gguf"

    whole, digits = (splitnet.AutoTokenizer.from_pretrained(written(split)) for split in ("gpt-2", "smollm"))
    assert whole("ab 12<end>").input_ids == [6, 5, 7, 0]
    assert digits("ab 12<end>").input_ids == [6, 5, 3, 4, 0]
    assert whole.eos_token == "<end>"
    assert whole.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<end>"
    with pytest.raises(ModelNotFound, match=r"'mystery', which is not known"):
        GgufStore(written("mystery")).tokenizer()

    path = write_gguf(random_checkpoint("qwen2", tmp_path / "checkpoint"), tmp_path / "model.gguf")
    with pytest.raises(ModelNotFound, match="give --tokenizer"):
        Checkpoint.open(path).tokenizer()
    whole.save_pretrained(tmp_path / "other")
    other = Checkpoint.open(path, tokenizer=str(tmp_path / "other")).tokenizer()
    assert other("ab 12<end>").input_ids == whole("ab 12<end>").input_ids
