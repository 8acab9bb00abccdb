"""Writes small checkpoints as GGUF files for tests that read them. Tensors change as in llama.cpp's converters.

Names of tensors come from the `gguf` package; changes were compared with the output of llama.cpp's own converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoConfig

from benchmarks.requantise import fitting, quantised

Tensors = dict[str, torch.Tensor]

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "lfm2": "lfm2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "qwen3_next": "qwen3next",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "nemotron_h": "nemotron_h_moe",
    "granitemoehybrid": "granitehybrid",
    "llama4_text": "llama4",
    "minimax_m2": "minimax-m2",
}
"""llama.cpp's architecture by transformers' family."""


def write_gguf(
    folder: Path,
    path: Path,
    stored: Type = Type.F32,
    *,
    split: int = 0,
    tokens: Sequence[str] = (),
    template: str = "",
    **metadata: Any,
) -> Path:
    """Writes a checkpoint in a folder as a GGUF file; of a model that reads images, the text model.

    Args:
        stored: type of the matrices whose row length fits the blocks of the type.
        tokens: a vocabulary; names such as <name> are special tokens. template: the chat template.
        split: tensors per file, with `path` as the prefix of the files; 0: one file.
        metadata: more keys of the architecture, with `__` in place of a full stop.

    Returns:
        The path of the file, or of the first file.
    """
    whole = AutoConfig.from_pretrained(folder)
    config = whole.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    _write_metadata(writer, architecture, config)
    for key, value in metadata.items():
        writer.add_key_value(f"{architecture}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    if layers := getattr(getattr(whole, "vision_config", None), "deepstack_visual_indexes", None):
        writer.add_uint32(f"{architecture}.n_deepstack_layers", len(layers))
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if len(token) > 1 and token[0] == "<" else 1 for token in tokens])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_chat_template(template)
    tensors = _tensors_of(folder)
    if whole is not config:
        tensors = {name: value for name, value in tensors.items() if not re.search("visual|vision|multi_modal", name)}
        outer = re.compile(r"^(model\.)?language_model(\.model)?\.")
        tensors = {outer.sub("model.", name): value for name, value in tensors.items()}
    for name, tensor in _converted(config, architecture, tensors):
        array = tensor.float().contiguous().numpy()
        kind = fitting(stored, array.shape[-1]) if _may_be_codes(name, array) else Type.F32
        writer.add_tensor(name, quantised(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if split else path


def write_mmproj(
    folder: Path, path: Path, stored: Type = Type.F32, *, fused: bool = False, swapped: bool = False, **metadata: Any
) -> Path:
    """Writes the tower and the projector of a checkpoint as llama.cpp's converters do.

    stored: type of the matrices. fused: Qwen2.5-VL's queries, keys and values stay one tensor. swapped: the layers of
    the MLP have each other's name, as in the first files of Gemma 3. metadata: more keys, or other values, with `__` in
    place of a full stop; None leaves a key out.
    """
    whole = AutoConfig.from_pretrained(folder)
    family, vision = whole.model_type, whole.vision_config
    siglip = family == "gemma3"
    depth = vision.num_hidden_layers
    values: dict[str, Any] = {
        "has_vision_encoder": True,
        "projector_type": PROJECTORS[family],
        "use_silu" if family == "qwen2_5_vl" else "use_gelu": True,
        "vision.projection_dim": whole.get_text_config().hidden_size,
        "vision.image_size": vision.image_size if siglip else 560,
        "vision.patch_size": vision.patch_size,
        "vision.embedding_length": vision.hidden_size,
        "vision.feed_forward_length": vision.intermediate_size,
        "vision.block_count": depth,
        "vision.attention.head_count": vision.num_attention_heads,
        "vision.attention.layer_norm_epsilon": getattr(vision, "layer_norm_eps", 1e-6),
        "vision.image_mean": [0.5, 0.4, 0.3],
        "vision.image_std": [0.5, 0.25, 0.2],
    }
    if siglip:
        side = vision.image_size // vision.patch_size
        values["vision.projector.scale_factor"] = side // int(whole.mm_tokens_per_image**0.5)
    if family == "qwen2_5_vl":
        values["vision.n_wa_pattern"] = vision.fullatt_block_indexes[0] + 1
        values["vision.window_size"] = vision.window_size
    layers: list[int] = list(getattr(vision, "deepstack_visual_indexes", ()))
    if PROJECTORS[family] == "qwen3vl_merger":
        values["vision.spatial_merge_size"] = vision.spatial_merge_size
        values["vision.is_deepstack_layers"] = [layer in layers for layer in range(depth)]
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in values.items():
        if value is not None:
            element = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(f"clip.{key}", value, gguf.GGUFValueType.get_type(value), sub_type=element)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(depth, 3))  # mm.2 counts as a block
    for name, value in _tensors_of(folder).items():
        if not re.search("visual|vision_tower|multi_modal", name) or "vision_tower.head" in name.replace(
            "vision_model.", ""
        ):
            continue
        for converted, tensor in _converted_tower(name, value, names, layers, fused or family != "qwen2_5_vl"):
            if swapped:
                ends = ("ffn_up", "ffn_down") if "ffn_up" in converted else ("ffn_down", "ffn_up")
                converted = converted.replace(*ends)
            kind = stored if tensor.ndim > 1 and "position_embd" not in converted else Type.F32
            kind = kind if converted.startswith("v.blk") or kind in (Type.F32, Type.F16) else Type.F16
            writer.add_tensor(converted, quantised(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PROJECTORS = {
    "gemma3": "gemma3",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "qwen3_vl": "qwen3vl_merger",
    "qwen3_5": "qwen3vl_merger",
}
"""Types of projectors by transformers' family."""


def _converted_tower(
    name: str, tensor: torch.Tensor, names: gguf.TensorNameMap, layers: list[int], fused: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    name = re.sub(r"^model\.", "", name).replace("_projection_weight", "_projection.weight")
    name = re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
    module, _, kind = name.rpartition(".")
    if name == "visual.patch_embed.proj.weight":
        yield "v.patch_embd.weight", tensor[:, :, 0]
        yield "v.patch_embd.weight.1", tensor[:, :, 1]
    elif match := re.match(r"visual\.deepstack_merger_list\.(\d+)\.(?:linear_)?(\w+)$", module):
        yield f"v.deepstack.{layers[int(match[1])]}.{match[2]}.{kind}", tensor
    elif match := re.match(r"visual\.merger\.linear_fc([12])$", module):
        yield f"mm.{2 * (int(match[1]) - 1)}.{kind}", tensor
    elif module == "visual.merger.norm":
        yield f"v.post_ln.{kind}", tensor
    elif ".attn.qkv" in module and not fused:
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{names.get_name(module.replace('qkv', letter))}.{kind}", part
    else:
        found = names.get_name(module)
        assert found is not None, name
        yield f"{found}.{kind}", tensor + 1 if "soft_emb_norm" in name else tensor


def _tensors_of(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _may_be_codes(name: str, array: np.ndarray) -> bool:
    return array.ndim > 1 and name.endswith(".weight") and not re.search("norm|conv|ffn_gate_inp", name)


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    def add(key: str, value: Any) -> None:
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            element = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(f"{architecture}.{key}", value, kind, sub_type=element)

    rope = getattr(config, "rope_parameters", None) or {}
    far = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "leading_dense_block_count": "first_k_dense_replace",
        "attention.sliding_window": "sliding_window",
    }
    if architecture in _FIELDS:
        fields = {key: name for key, name in fields.items() if key not in _FIELDS[architecture]} | _FIELDS[architecture]
    for key, name in fields.items():
        add(key, getattr(config, name, None) if name else None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if architecture != "phi3" and getattr(config, name, None):
            add("expert_count", getattr(config, name))
            break
    add("rope.freq_base", far.get("rope_theta"))
    add("rope.freq_base_swa", rope.get("sliding_attention", {}).get("rope_theta"))
    add("attention.layer_norm_rms_epsilon", getattr(config, "rms_norm_eps", getattr(config, "norm_eps", None)))
    if architecture != "deepseek2":
        add("attention.key_length", head_dim)
        add("rope.dimension_count", int(head_dim * far.get("partial_rotary_factor", 1.0)))
    if far.get("rope_type") == "yarn":
        add("rope.scaling.type", "yarn")
        add("rope.scaling.factor", far["factor"])
        add("rope.scaling.original_context_length", far["original_max_position_embeddings"])
        add("rope.scaling.yarn_beta_fast", far.get("beta_fast"))
        add("rope.scaling.yarn_beta_slow", far.get("beta_slow"))
    for key, value in _OTHERS.get(architecture, lambda config: {})(config).items():
        add(key, value)


_DELTA_FIELDS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "expert_weights_norm": "",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_FIELDS: dict[str, dict[str, str]] = {
    "llama": {"attention.sliding_window": "", "expert_feed_forward_length": ""},
    "qwen2": {"attention.sliding_window": ""},
    "qwen3": {"attention.sliding_window": ""},
    "qwen3moe": {"attention.sliding_window": "", "expert_weights_norm": ""},
    "gpt-oss": {"expert_feed_forward_length": "intermediate_size"},
    "lfm2": {"attention.head_count_kv": "", "shortconv.l_cache": "conv_L_cache"},
    "minimax-m2": {"expert_feed_forward_length": "intermediate_size"},
    "deepseek2": {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"},
    "qwen3next": _DELTA_FIELDS,
    "qwen35moe": _DELTA_FIELDS | {"feed_forward_length": ""},
    "qwen35": {key: name for key, name in _DELTA_FIELDS.items() if not key.startswith("expert")},
    "nemotron_h_moe": {
        "attention.sliding_window": "",
        "attention.head_count_kv": "",
        "feed_forward_length": "",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "ssm_state_size",
        "ssm.group_count": "n_groups",
        "ssm.time_step_rank": "mamba_num_heads",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    },
    "granitehybrid": {
        "attention.head_count_kv": "",
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
        "expert_shared_feed_forward_length": "shared_intermediate_size",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.group_count": "mamba_n_groups",
        "ssm.time_step_rank": "mamba_n_heads",
    },
    "llama4": {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "attention.sliding_window": "",
    },
}


def _delta(config: Any) -> dict[str, Any]:
    return {"ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads}


def _sections(config: Any) -> dict[str, Any]:
    return {"rope.dimension_sections": [*config.rope_parameters.get("mrope_section", (11, 11, 10)), 0]}


def _heads_per_block(config: Any) -> list[int]:
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


_OTHERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lfm2": lambda config: {"attention.head_count_kv": _heads_per_block(config)},
    "deepseek2": lambda config: {
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
    },
    "glm4moe": lambda config: {"expert_gating_func": 2},
    "minimax-m2": lambda config: {"expert_gating_func": 2},
    "qwen3next": lambda config: _delta(config) | {"full_attention_interval": 4},
    "qwen2vl": lambda config: _sections(config),
    "qwen3vl": lambda config: _sections(config),
    "qwen35": lambda config: _delta(config) | _sections(config),
    "qwen35moe": lambda config: _delta(config) | _sections(config),
    "nemotron_h_moe": lambda config: {
        "attention.head_count_kv": _heads_per_block(config),
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "feed_forward_length": [config.moe_intermediate_size] * config.num_hidden_layers,
    },
    "granitehybrid": lambda config: {
        "attention.head_count_kv": _heads_per_block(config),
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "rope.scaling.finetuned": False,
    },
}


def _converted(config: Any, architecture: str, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama_3_factors(config, rope)
    for name, tensor in _experts_stacked(tensors):
        for changed, value in _changed(config, name, tensor):
            module, _, kind = changed.rpartition(".")
            found = names.get_name(module)
            if match := re.search(r"layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head\.norm)$", module):
                # The package knows this tensor for fewer architectures than current converters do.
                found = f"blk.{match[1]}.nextn.{match[2].replace('.', '_')}"
            assert found is not None, changed
            # transformers' names of some parameters have no suffix `weight`: A, D
            yield found + ("" if kind == "plain" else f".{kind}"), value


def _experts_stacked(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.match(r"(.+\.experts)\.(\d+)\.(.+)$", name):
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        else:
            yield name, tensor
    for name, experts in stacks.items():
        yield name, torch.stack([experts[index] for index in range(len(experts))])


def _changed(config: Any, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a converter makes of one tensor, with names that the `gguf` package knows, or `.plain` without a
    suffix."""
    family = config.model_type
    if family in ("llama", "mixtral", "granitemoehybrid") and re.search(r"[qk]_proj\.(weight|bias)$", name):
        heads = config.num_key_value_heads if "k_proj" in name else config.num_attention_heads
        tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    if family in ("gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") and name.endswith("norm.weight"):
        tensor = tensor if "linear_attn" in name else tensor + 1
    if family in ("qwen3_5_text", "qwen3_5_moe_text") and "linear_attn" in name:
        tensor = _values_in_turns(config, name, tensor)
    name = re.sub(r"^backbone(.+)\.mixer\.experts", r"model\1.mlp.experts", name)
    if name.endswith("in_proj_qkvz.weight"):
        heads, key = config.linear_num_key_heads, config.linear_key_head_dim
        value = config.linear_num_value_heads // heads * config.linear_value_head_dim
        q, k, v, z = tensor.view(heads, -1, tensor.shape[1]).split([key, key, value, value], dim=1)
        yield name.replace("qkvz", "qkv"), torch.cat([one.flatten(0, 1) for one in (q, k, v)])
        yield name.replace("qkvz", "z"), z.flatten(0, 1)
    elif name.endswith("kv_b_proj.weight"):
        whole = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
        keys, values = whole.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield name.replace("kv_b", "k_b"), keys.transpose(1, 2)
        yield name.replace("kv_b", "v_b"), values
    elif family in ("gpt_oss", "llama4_text") and "experts." in name:
        yield from _transposed_experts(family, name, tensor)
    elif name.endswith(("block_sparse_moe.input_linear.weight", "shared_mlp.input_linear.weight")):
        path = "shared_mlp" if "shared" in name else "mlp.experts"
        before = name.partition("block_sparse_moe")[0].partition("shared_mlp")[0]
        gates, ups = tensor.chunk(2, dim=-2)
        shared = {"shared_mlp": "mlp.shared_expert"}.get(path, path)
        yield f"{before}{shared}.gate_proj.weight", gates
        yield f"{before}{shared}.up_proj.weight", ups
    elif name.endswith("A_log"):
        decay = -torch.exp(tensor)
        yield f"{name}.plain", decay.unsqueeze(-1) if _is_mamba(name) else decay
    elif name.endswith((".mixer.D", ".mamba.D")):
        yield f"{name}.plain", tensor.unsqueeze(-1)
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias" if "linear_attn" in name or "mamba" in name else "dt.bias"), tensor
    elif "conv1d.weight" in name or "conv.conv.weight" in name:
        yield name, tensor.squeeze(1)
    elif re.search(r"(mixer|mamba)\.norm\.weight$", name):
        groups = getattr(config, "n_groups", None) or config.mamba_n_groups
        yield name, tensor.view(groups, -1)
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
    elif name.endswith("sinks"):
        yield f"{name}.weight", tensor
    else:
        yield name, tensor


def _is_mamba(name: str) -> bool:
    return ".mixer." in name or ".mamba." in name


def _transposed_experts(family: str, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    bias = name.endswith("_bias")
    path, kind = name.removesuffix("_bias"), "bias" if bias else "weight"
    if not bias:
        tensor = tensor.transpose(1, 2)
    if "down_proj" in name:
        yield f"{path}.{kind}", tensor
        return
    gates, ups = (tensor[:, ::2], tensor[:, 1::2]) if family == "gpt_oss" else tensor.chunk(2, dim=1)
    yield f"{path.replace('gate_up', 'gate')}.{kind}", gates
    yield f"{path.replace('gate_up', 'up')}.{kind}", ups


def _values_in_turns(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Reorders value heads: from grouped by key head, to the first of each key head, then the second of each, and so
    on."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    width = 1 if re.search(r"in_proj_[ab]|A_log|dt_bias", name) else config.linear_value_head_dim

    def turned(part: torch.Tensor, dim: int) -> torch.Tensor:
        shape = part.shape
        split = part.reshape(*shape[:dim], keys, values // keys, width, *shape[dim + 1 :])
        return split.transpose(dim, dim + 1).reshape(shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        before = 2 * keys * config.linear_key_head_dim
        return torch.cat([tensor[:before], turned(tensor[before:], 0)])
    if name.endswith("linear_attn.norm.weight"):
        return tensor
    return turned(tensor, 1 if "out_proj" in name else 0)


def _llama_3_factors(config: Any, rope: dict[str, Any]) -> torch.Tensor:
    frequencies = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)
