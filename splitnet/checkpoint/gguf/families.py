"""The families that GGUF files hold: what their metadata and tensors are in transformers.

What llama.cpp's converters (the package `conversion` of its repository) change in a checkpoint is undone here: rows
that they put in another order, norms that they store plus one, what they join, split or negate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from splitnet.checkpoint.gguf.config import Metadata, rope_parameters
from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.errors import UnsupportedModel

Values = dict[str, Any]
"""Of a config."""


class Change(NamedTuple):
    """A tensor of transformers that is not one of the file under another name.

    Attributes:
        name: within the block.
        parts: the tensors of the file, within the block; without them there is no such tensor.
        make: makes it from the config and the parts; it is also run with parts on the meta device.
        keeps_codes: whether codes stay codes.
    """

    name: str
    parts: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    keeps_codes: bool = True


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF files.

    Attributes:
        model_type: of transformers.
        fields: key of the metadata -> field of the config; None: it is known, and read otherwise or without effect.
        tensors: module of a block in the file -> in transformers; so are their weights and biases.
        changes: what is not only renamed.
        settle: adds to the config's values what `fields` cannot say.
        outside: the same for modules outside of blocks.
        container: what stands before the number of a block in transformers.
        partial_rope: whether heads may be turned in part.
        plain_rope: whether `rope_parameters` describes its rotary embedding.
        raised_norms: whether the file has the weights of norms plus one.
    """

    model_type: str
    fields: Mapping[str, str | None]
    tensors: Mapping[str, str]
    changes: tuple[Change, ...] = ()
    settle: Callable[[Values, Metadata], None] | None = None
    outside: Mapping[str, str] | None = None
    container: str = "model.layers"
    partial_rope: bool = False
    plain_rope: bool = True
    raised_norms: bool = False


def family_of(file: GgufFile) -> Family:
    """The family of a file.

    Raises:
        UnsupportedModel: it is not known.
    """
    found = FAMILIES.get(file.architecture)
    if found is None:
        raise UnsupportedModel(
            f"{file.name} holds a model of the architecture {file.architecture!r}, which splitnet does not read from "
            "GGUF files: take its safetensors"
        )
    return found(file) if callable(found) else found


def config_values(family: Family, file: GgufFile) -> Values:
    """The values of the config that the metadata give.

    Raises:
        UnsupportedModel: something is missing or not known.
    """
    metadata = Metadata(file)
    values: Values = {}
    for key, field in family.fields.items():
        value = metadata.get(key)
        if field is not None and value is not None:
            values[field] = value
    values["num_hidden_layers"] = metadata["block_count"] - metadata.get("nextn_predict_layers", 0)
    if "head_dim" in family.fields.values():
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if family.plain_rope:
        values["rope_parameters"] = rope_parameters(metadata, head_dim=values["head_dim"], partial=family.partial_rope)
    if family.settle is not None:
        family.settle(values, metadata)
    metadata.check_all_used()
    return values


def _has(metadata: Metadata, tensor: str) -> bool:
    """Whether any block has a tensor."""
    return any(name.startswith("blk.") and name.endswith(f".{tensor}") for name in metadata.file.tensors)


def _blocks_with(metadata: Metadata, count: int, kinds: Mapping[str, str]) -> list[str]:
    """The kind of each block: that of the first of these tensors that it has."""
    names = metadata.file.tensors
    found = [next((kind for tensor, kind in kinds.items() if f"blk.{i}.{tensor}" in names), None) for i in range(count)]
    if None in found:
        raise ValueError(f"block {found.index(None)} has none of {', '.join(kinds)}")
    return [kind for kind in found if kind is not None]


# Rows and columns in another order.


def _heads_of(config: Any, name: str) -> int:
    return config.num_key_value_heads if name == "k" else config.num_attention_heads


def _halves_apart(name: str) -> Callable[..., torch.Tensor]:
    """Undoes the order that llama.cpp wants for Llama: the halves of a head that are turned together, in turns."""

    def make(config: Any, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]
        order = torch.arange(count).view(_heads_of(config, name), -1, 2).transpose(1, 2).reshape(count)
        return rows.index_select(0, order)

    return make


LLAMA_ORDER = tuple(
    Change(f"self_attn.{name}_proj.{kind}", (f"attn_{name}.{kind}",), _halves_apart(name))
    for name in ("q", "k")
    for kind in ("weight", "bias")
)


def _grouped(config: Any, width: int, count: int) -> torch.Tensor:
    """The order of so many rows or columns that groups value heads by their key head; llama.cpp puts them in turns."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return torch.arange(count).view(values // keys, keys, width).transpose(0, 1).reshape(-1)


def _value_rows(width: str, after_keys: bool = False, dim: int = 0) -> Callable[..., torch.Tensor]:
    """Undoes that order where heads have as many rows as the config's `width` says, after queries and keys or not."""

    def make(config: Any, rows: torch.Tensor) -> torch.Tensor:
        before = 2 * config.linear_num_key_heads * config.linear_key_head_dim if after_keys else 0
        order = before + _grouped(config, getattr(config, width) if width else 1, rows.shape[dim] - before)
        if after_keys:
            order = torch.cat([torch.arange(before), order])
        return rows.index_select(dim, order)

    return make


def _queries_to_gates(config: Any, rest: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Queries, keys, values and gates of all heads -> those of the first key head, of the second, and so on."""
    heads, key = config.linear_num_key_heads, config.linear_key_head_dim
    value = config.linear_num_value_heads // heads * config.linear_value_head_dim
    both = torch.cat([rest, gates])
    parts = torch.arange(len(both)).split([heads * width for width in (key, key, value, value)])
    order = torch.cat([part.view(heads, -1) for part in parts], dim=1).flatten()
    return both.index_select(0, order)


# What is joined, split or computed.


def _joined(dim: int = 0) -> Callable[..., torch.Tensor]:
    return lambda config, *parts: torch.cat(parts, dim=dim)


def _interleaved(config: Any, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    width = gates.shape[1]
    order = torch.arange(2 * width).view(2, width).transpose(0, 1).reshape(-1)
    return torch.cat([gates, ups], dim=1).index_select(1, order)


def _interleaved_inputs_first(config: Any, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    return _interleaved(config, gates, ups).transpose(1, 2)


def _inputs_first(config: Any, experts: torch.Tensor) -> torch.Tensor:
    return experts.transpose(1, 2)


def _joined_inputs_first(config: Any, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    return torch.cat([gates, ups], dim=1).transpose(1, 2)


def _as_it_is(config: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _one_row(config: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1, -1)


def _channels(config: Any, kernel: torch.Tensor) -> torch.Tensor:
    return kernel.reshape(kernel.shape[0], 1, -1)


def _value_channels(config: Any, kernel: torch.Tensor) -> torch.Tensor:
    return _channels(config, _value_rows("linear_value_head_dim", after_keys=True)(config, kernel))


def _flat(config: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def _log_of_decay(config: Any, decay: torch.Tensor) -> torch.Tensor:
    return torch.log(-decay.reshape(-1))


def _log_of_decay_of_values(config: Any, decay: torch.Tensor) -> torch.Tensor:
    return _value_rows("")(config, _log_of_decay(config, decay))


def _keys_and_values(config: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The two halves of `kv_b_proj` by heads; that of the keys is stored transposed."""
    whole = torch.cat([keys.transpose(1, 2), values], dim=1)
    return whole.reshape(-1, whole.shape[-1])


def _experts(path: str) -> tuple[Change, ...]:
    """Experts that transformers has stacked, gates above ups."""
    parts = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
    return (
        Change(f"{path}.gate_up_proj", parts, _joined(1)),
        Change(f"{path}.gate_up_proj", ("ffn_gate_up_exps.weight",), _as_it_is),
        Change(f"{path}.down_proj", ("ffn_down_exps.weight",), _as_it_is),
    )


OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BLOCK = _ATTENTION | {"ffn_norm": "post_attention_layernorm"} | _MLP
_NORM_AFTER_ATTENTION = {"post_attention_norm": "post_attention_layernorm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _shared(name: str) -> dict[str, str]:
    return {f"ffn_{kind}_shexp": f"{name}.{kind}_proj" for kind in ("gate", "up", "down")}


_SIZES: dict[str, str | None] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_WIDTH = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _fixed(**values: Any) -> Callable[[Values, Metadata], None]:
    return lambda found, metadata: found.update(values)


def _biases(found: Values, metadata: Metadata) -> None:
    found["attention_bias"] = _has(metadata, "attn_q.bias")


def _llama(found: Values, metadata: Metadata) -> None:
    _biases(found, metadata)
    found["mlp_bias"] = _has(metadata, "ffn_down.bias")


def _seed_oss(found: Values, metadata: Metadata) -> None:
    _biases(found, metadata)
    found["attention_out_bias"] = _has(metadata, "attn_output.bias")


def _gpt_oss(found: Values, metadata: Metadata) -> None:
    found["rope_parameters"].setdefault("truncate", False)
    _check_gating(metadata, softmax=True)


def _check_gating(metadata: Metadata, *, softmax: bool) -> None:
    if metadata.get("expert_gating_func", 1 if softmax else 2) != (1 if softmax else 2):
        raise UnsupportedModel(f"{metadata.file.name} chooses experts in a way that its family does not: take another")


def _gemma(found: Values, metadata: Metadata, *, widest: int) -> None:
    """The largest Gemma of each generation, which has `widest` blocks, divides scores by another number."""
    wide = found["num_hidden_layers"] == widest
    width = found["hidden_size"] // found["num_attention_heads"] if wide else found["head_dim"]
    found["query_pre_attn_scalar"] = width


def _gemma_2(found: Values, metadata: Metadata) -> None:
    _gemma(found, metadata, widest=46)


def _gemma_3(found: Values, metadata: Metadata) -> None:
    _gemma(found, metadata, widest=62)
    near = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10_000.0)}
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": near}


def _gemma_4(found: Values, metadata: Metadata) -> None:
    near = metadata["attention.sliding_window_pattern"]
    found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in near]
    if isinstance(heads := found["num_key_value_heads"], list):
        found["num_key_value_heads"] = heads[near.index(True)]
        found["num_global_key_value_heads"] = heads[near.index(False)]
    if isinstance(widths := found["intermediate_size"], list):
        found["intermediate_size"] = min(widths)
        found["use_double_wide_mlp"] = len(set(widths)) > 1
    found["global_head_dim"] = metadata["attention.key_length"]
    found["vocab_size_per_layer_input"] = metadata.file.tensors["token_embd.weight"].shape[0]
    names = metadata.file.tensors
    own = range(found["num_hidden_layers"] - found["num_kv_shared_layers"])
    found["attention_k_eq_v"] = any(f"blk.{block}.attn_v.weight" not in names for block in own)
    found["enable_moe_block"] = "num_experts" in found
    turned = names["rope_freqs.weight"].tensor() == 1 if "rope_freqs.weight" in names else torch.ones(1)
    found["rope_parameters"] = {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": metadata["rope.freq_base"],
            "partial_rotary_factor": float(turned.float().mean()),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10_000.0)},
    }
    metadata.skip("rope.dimension_count", "rope.dimension_count_swa", "attention.value_length_swa")


def _phi_3(found: Values, metadata: Metadata) -> None:
    positions = metadata.get("rope.scaling.original_context_length")
    found["original_max_position_embeddings"] = positions or found["max_position_embeddings"]
    found["sliding_window"] = found.get("sliding_window") or None  # 0 says that there is none


def _lfm_2(found: Values, metadata: Metadata) -> None:
    heads = found["num_key_value_heads"]
    found["layer_types"] = ["full_attention" if count else "conv" for count in heads][: found["num_hidden_layers"]]
    found["num_key_value_heads"] = max(heads)
    found["conv_bias"] = _has(metadata, "shortconv.in_proj.bias")
    found["block_auto_adjust_ff_dim"] = False


def _lfm_2_moe(found: Values, metadata: Metadata) -> None:
    _lfm_2(found, metadata)
    _check_gating(metadata, softmax=False)
    found["use_expert_bias"] = _has(metadata, "exp_probs_b.bias")


def _latent_attention(found: Values, metadata: Metadata) -> None:
    """DeepSeek's: keys and values of all heads come from one latent vector."""
    found["num_key_value_heads"] = found["num_attention_heads"]
    found.setdefault("q_lora_rank", None)
    found["qk_rope_head_dim"] = turned = metadata["rope.dimension_count"]
    whole = metadata.get("attention.key_length_mla", metadata.get("attention.key_length"))
    found["qk_nope_head_dim"] = whole - turned
    found["v_head_dim"] = metadata.get("attention.value_length_mla", metadata.get("attention.value_length"))
    found["rope_parameters"] = rope = rope_parameters(metadata, head_dim=turned)
    if "rope.scaling.yarn_log_multiplier" in metadata:
        # The converter multiplies it with 0.1; all published models have both of the same size.
        scale = round(10 * metadata["rope.scaling.yarn_log_multiplier"], 6)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    found["norm_topk_prob"] = metadata.get("expert_weights_norm", False)
    # Files of 2025 do not say it; DeepSeek V3 alone has 256 experts.
    groups = (8, 4) if found["n_routed_experts"] == 256 and metadata.file.architecture == "deepseek2" else (1, 1)
    found["n_group"] = metadata.get("expert_group_count", groups[0])
    found["topk_group"] = metadata.get("expert_group_used_count", groups[1])


def _deepseek_3(found: Values, metadata: Metadata) -> None:
    _latent_attention(found, metadata)
    _check_gating(metadata, softmax=False)


def _deepseek_2(found: Values, metadata: Metadata) -> None:
    _latent_attention(found, metadata)
    _check_gating(metadata, softmax=True)
    found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"


def _glm_dsa(found: Values, metadata: Metadata) -> None:
    _deepseek_3(found, metadata)
    if "attention.indexer.types" in metadata:
        whole = metadata["attention.indexer.types"]
        found["indexer_types"] = ["full" if one else "shared" for one in whole][: found["num_hidden_layers"]]


def _glm_4_moe(found: Values, metadata: Metadata) -> None:
    _biases(found, metadata)
    _check_gating(metadata, softmax=False)
    found["use_qk_norm"] = _has(metadata, "attn_q_norm.weight")
    found.setdefault("n_group", 1)
    found.setdefault("topk_group", 1)


def _gated_delta(found: Values, metadata: Metadata) -> None:
    """Linear attention in most blocks, full attention in some."""
    heads = found["linear_num_value_heads"]
    found["linear_value_head_dim"] = metadata["ssm.inner_size"] // heads
    kinds = {"ssm_out.weight": "linear_attention", "attn_q.weight": "full_attention"}
    found["layer_types"] = _blocks_with(metadata, found["num_hidden_layers"], kinds)


def _qwen_3_5(found: Values, metadata: Metadata) -> None:
    _gated_delta(found, metadata)
    sections = [size for size in metadata["rope.dimension_sections"] if size]
    found["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}


def _mamba_blocks(found: Values, metadata: Metadata) -> None:
    found["num_key_value_heads"] = max(found["num_key_value_heads"]) or found["num_attention_heads"]
    names = metadata.file.tensors
    keys = next((one for name, one in names.items() if name.endswith(".attn_k.weight")), None)
    if keys is not None:
        found["num_key_value_heads"] = keys.shape[0] // found["head_dim"]


def _nemotron_h(found: Values, metadata: Metadata) -> None:
    _mamba_blocks(found, metadata)
    kinds = {
        "ssm_in.weight": "linear_attention",
        "attn_q.weight": "full_attention",
        "ffn_up_exps.weight": "moe",
        "ffn_up.weight": "mlp",
    }
    found["layers_block_type"] = _blocks_with(metadata, found.pop("num_hidden_layers"), kinds)
    found["mamba_head_dim"] = metadata["ssm.inner_size"] // found["mamba_num_heads"]
    found["expand"] = max(1, metadata["ssm.inner_size"] // found["hidden_size"])
    found["use_conv_bias"] = _has(metadata, "ssm_conv1d.bias")
    found["attention_bias"] = _has(metadata, "attn_q.bias")
    found["mlp_bias"] = _has(metadata, "ffn_up.bias")
    dense = [one.shape[0] for name, one in metadata.file.tensors.items() if name.endswith(".ffn_up.weight")]
    found["intermediate_size"] = dense[0] if dense else max(found["intermediate_size"])
    metadata.skip("rope.freq_base", "rope.dimension_count")  # its attention turns nothing


def _granite_moe(found: Values, metadata: Metadata) -> None:
    _biases(found, metadata)


def _granite_hybrid(found: Values, metadata: Metadata) -> None:
    _mamba_blocks(found, metadata)
    kinds = {"ssm_in.weight": "linear_attention", "attn_q.weight": "full_attention"}
    found["layer_types"] = _blocks_with(metadata, found["num_hidden_layers"], kinds)
    found["mamba_d_head"] = metadata["ssm.inner_size"] // found["mamba_n_heads"]
    found["mamba_expand"] = metadata["ssm.inner_size"] // found["hidden_size"]
    found["mamba_conv_bias"] = _has(metadata, "ssm_conv1d.bias")
    found["position_embedding_type"] = "rope" if metadata.get("rope.scaling.finetuned", True) else "nope"
    found.setdefault("num_local_experts", 0)
    if not found["num_local_experts"]:
        found["shared_intermediate_size"] = found["intermediate_size"]


def _llama_4(found: Values, metadata: Metadata) -> None:
    if not found.get("intermediate_size"):
        found["intermediate_size"] = found["intermediate_size_mlp"]
    # Scout normalises queries and keys, Maverick does not; nothing in a file says so but the number of experts.
    found["use_qk_norm"] = found["num_local_experts"] != 128


def _minimax_m2(found: Values, metadata: Metadata) -> None:
    _check_gating(metadata, softmax=False)
    found["rotary_dim"] = metadata["rope.dimension_count"]


def _ministral_3(found: Values, metadata: Metadata) -> None:
    rope = found["rope_parameters"]
    if "attention.temperature_scale" in metadata:
        rope["llama_4_scaling_beta"] = metadata["attention.temperature_scale"]
    if "rope.scaling.yarn_log_multiplier" in metadata:
        rope |= {"mscale": 1.0, "mscale_all_dim": metadata["rope.scaling.yarn_log_multiplier"]}


_LLAMA = Family("llama", _SIZES, _BLOCK, LLAMA_ORDER, _llama)
_MIXTRAL = Family("mixtral", _SIZES | _LOCAL_EXPERTS, _BLOCK | _ROUTER, (*LLAMA_ORDER, *_experts("mlp.experts")))
_DEEPSEEK_BLOCK = (
    _BLOCK
    | _ROUTER
    | _shared("mlp.shared_experts")
    | {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
    }
)
_DEEPSEEK_CHANGES = (
    *_experts("mlp.experts"),
    Change("mlp.gate.e_score_correction_bias", ("exp_probs_b.bias",), _as_it_is),
    Change("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), _keys_and_values, keeps_codes=False),
)
_DEEPSEEK_SIZES = {key: field for key, field in _SIZES.items() if field != "head_dim"} | {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": None,
}
_INDEXER = {
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
}
_INDEXER_SIZES = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}


def _llama_or_mixtral(file: GgufFile) -> Family:
    return _MIXTRAL if file.of_architecture.get("expert_count") else _LLAMA


def _deepseek(file: GgufFile) -> Family:
    third = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    third = third or file.of_architecture.get("expert_gating_func") == 2
    return Family(
        "deepseek_v3" if third else "deepseek_v2",
        _DEEPSEEK_SIZES,
        _DEEPSEEK_BLOCK,
        _DEEPSEEK_CHANGES,
        _deepseek_3 if third else _deepseek_2,
        plain_rope=False,
    )


def _dense_or_moe_granite(file: GgufFile) -> Family:
    joined = (
        Change("shared_mlp.input_linear.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), _joined()),
        Change("shared_mlp.output_linear.weight", ("ffn_down_shexp.weight",), _as_it_is),
        Change("shared_mlp.input_linear.weight", ("ffn_gate.weight", "ffn_up.weight"), _joined()),
        Change("shared_mlp.output_linear.weight", ("ffn_down.weight",), _as_it_is),
    )
    experts = _experts("block_sparse_moe.experts")
    block = _ATTENTION | {"ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "block_sparse_moe.router"}
    fields = _SIZES | _LOCAL_EXPERTS | _GRANITE | {"expert_shared_feed_forward_length": "shared_intermediate_size"}
    if file.architecture == "granitemoe":
        shared = "expert_shared_feed_forward_length" in file.of_architecture
        family = "granitemoeshared" if shared else "granitemoe"
        return Family(family, fields, block, (*LLAMA_ORDER, *experts, *joined), _granite_moe)
    mixer = {"ssm_in": "mamba.in_proj", "ssm_out": "mamba.out_proj"}
    return Family(
        "granitemoehybrid",
        fields
        | {
            "ssm.conv_kernel": "mamba_d_conv",
            "ssm.state_size": "mamba_d_state",
            "ssm.group_count": "mamba_n_groups",
            "ssm.time_step_rank": "mamba_n_heads",
        },
        block | mixer,
        (*LLAMA_ORDER, *experts, *joined, *_mamba("mamba")),
        _granite_hybrid,
    )


def _mamba(path: str) -> tuple[Change, ...]:
    return (
        Change(f"{path}.A_log", ("ssm_a",), _log_of_decay),
        Change(f"{path}.D", ("ssm_d",), _flat),
        Change(f"{path}.dt_bias", ("ssm_dt.bias",), _as_it_is),
        Change(f"{path}.conv1d.weight", ("ssm_conv1d.weight",), _channels),
        Change(f"{path}.conv1d.bias", ("ssm_conv1d.bias",), _as_it_is),
        Change(f"{path}.norm.weight", ("ssm_norm.weight",), _flat),
    )


_QWEN_MOE_BLOCK = _BLOCK | _ROUTER | _shared("mlp.shared_expert")
_QWEN_MOE_CHANGES = (
    *_experts("mlp.experts"),
    Change("mlp.shared_expert_gate.weight", ("ffn_gate_inp_shexp.weight",), _one_row),
)
_QWEN_3_VL: dict[str, str | None] = {"rope.dimension_sections": None, "n_deepstack_layers": None}
"""With text alone it is Qwen3: what differs is said of images only."""
_DELTA_SIZES = _SIZES | {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_DELTA_BLOCK = _NORM_AFTER_ATTENTION | {"ssm_norm": "linear_attn.norm"}
_QWEN_3_5_BLOCK = _DELTA_BLOCK
_QWEN_3_5_CHANGES = (
    Change(
        "linear_attn.in_proj_qkv.weight",
        ("attn_qkv.weight",),
        _value_rows("linear_value_head_dim", after_keys=True),
    ),
    Change("linear_attn.in_proj_z.weight", ("attn_gate.weight",), _value_rows("linear_value_head_dim")),
    Change("linear_attn.in_proj_a.weight", ("ssm_alpha.weight",), _value_rows("")),
    Change("linear_attn.in_proj_b.weight", ("ssm_beta.weight",), _value_rows("")),
    Change("linear_attn.dt_bias", ("ssm_dt.bias",), _value_rows("")),
    Change("linear_attn.A_log", ("ssm_a",), _log_of_decay_of_values),
    Change("linear_attn.conv1d.weight", ("ssm_conv1d.weight",), _value_channels),
    Change("linear_attn.out_proj.weight", ("ssm_out.weight",), _value_rows("linear_value_head_dim", dim=1)),
)
_LFM_2_BLOCK = _ATTENTION | {
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_LFM_2_CHANGES = (
    Change("conv.conv.weight", ("shortconv.conv.weight",), _channels),
    Change("conv.conv.bias", ("shortconv.conv.bias",), _as_it_is),
)
_LFM_2_SIZES = _SIZES | {"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"}
_LFM_2_OUTSIDE = OUTSIDE | {"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"}
_NEMOTRON_H = Family(
    "nemotron_h",
    {key: field for key, field in _SIZES.items() if field != "rms_norm_eps"}
    | {
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "ssm_state_size",
        "ssm.group_count": "n_groups",
        "ssm.time_step_rank": "mamba_num_heads",
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "n_shared_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "moe_latent_size": "moe_latent_size",
    },
    {
        "attn_norm": "norm",
        "attn_q": "mixer.q_proj",
        "attn_k": "mixer.k_proj",
        "attn_v": "mixer.v_proj",
        "attn_output": "mixer.o_proj",
        "ffn_up": "mixer.up_proj",
        "ffn_down": "mixer.down_proj",
        "ffn_gate_inp": "mixer.gate",
        "ffn_up_shexp": "mixer.shared_experts.up_proj",
        "ffn_down_shexp": "mixer.shared_experts.down_proj",
        "ffn_latent_down": "mixer.fc1_latent_proj",
        "ffn_latent_up": "mixer.fc2_latent_proj",
        "ssm_in": "mixer.in_proj",
        "ssm_out": "mixer.out_proj",
    },
    (
        *_mamba("mixer"),
        Change("mixer.experts.up_proj", ("ffn_up_exps.weight",), _as_it_is),
        Change("mixer.experts.down_proj", ("ffn_down_exps.weight",), _as_it_is),
        Change("mixer.gate.e_score_correction_bias", ("exp_probs_b.bias",), _as_it_is),
    ),
    _nemotron_h,
    {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"},
    "backbone.layers",
    plain_rope=False,
)

FAMILIES: Mapping[str, Family | Callable[[GgufFile], Family]] = {
    "llama": _llama_or_mixtral,
    "mistral3": Family("ministral3", _SIZES, _BLOCK, LLAMA_ORDER, _ministral_3),
    "smollm3": Family("smollm3", _SIZES, _BLOCK, LLAMA_ORDER, _biases),
    "seed_oss": Family("seed_oss", _SIZES, _BLOCK | _NORM_AFTER_ATTENTION, (), _seed_oss),
    "ernie4_5": Family("ernie4_5", _SIZES, _BLOCK, ()),
    "olmo2": Family("olmo2", _SIZES, _ATTENTION | _MLP | _FOUR_NORMS, ()),
    "qwen2": Family("qwen2", _SIZES, _BLOCK),
    "qwen2moe": Family(
        "qwen2_moe", _SIZES | _EXPERTS | _EXPERT_WIDTH | _SHARED_WIDTH, _QWEN_MOE_BLOCK, _QWEN_MOE_CHANGES
    ),
    "qwen3": Family("qwen3", _SIZES, _BLOCK, (), _biases),
    "qwen3moe": Family(
        "qwen3_moe",
        _SIZES | _EXPERTS | _EXPERT_WIDTH,
        _BLOCK | _ROUTER,
        _experts("mlp.experts"),
        _fixed(norm_topk_prob=True),
    ),
    "qwen3vl": Family("qwen3", _QWEN_3_VL | _SIZES, _BLOCK, (), _biases),
    "qwen3vlmoe": Family(
        "qwen3_moe",
        _QWEN_3_VL | _SIZES | _EXPERTS | _EXPERT_WIDTH,
        _BLOCK | _ROUTER,
        _experts("mlp.experts"),
        _fixed(norm_topk_prob=True),
    ),
    "qwen3next": Family(
        "qwen3_next",
        _DELTA_SIZES | _EXPERTS | _EXPERT_WIDTH | _SHARED_WIDTH,
        _QWEN_MOE_BLOCK | _DELTA_BLOCK | {"ssm_ba": "linear_attn.in_proj_ba", "ssm_out": "linear_attn.out_proj"},
        (
            *_QWEN_MOE_CHANGES,
            Change("linear_attn.in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), _queries_to_gates),
            Change("linear_attn.A_log", ("ssm_a",), _log_of_decay),
            Change("linear_attn.dt_bias", ("ssm_dt.bias",), _as_it_is),
            Change("linear_attn.conv1d.weight", ("ssm_conv1d.weight",), _channels),
        ),
        _gated_delta,
        partial_rope=True,
        raised_norms=True,
    ),
    "qwen35": Family(
        "qwen3_5_text",
        _DELTA_SIZES | {"expert_shared_feed_forward_length": None},
        _BLOCK | _QWEN_3_5_BLOCK,
        _QWEN_3_5_CHANGES,
        _qwen_3_5,
        partial_rope=True,
        raised_norms=True,
    ),
    "qwen35moe": Family(
        "qwen3_5_moe_text",
        _DELTA_SIZES | _EXPERTS | _EXPERT_WIDTH | _SHARED_WIDTH,
        _QWEN_MOE_BLOCK | _QWEN_3_5_BLOCK,
        (*_QWEN_MOE_CHANGES, *_QWEN_3_5_CHANGES),
        _qwen_3_5,
        partial_rope=True,
        raised_norms=True,
    ),
    "gpt-oss": Family(
        "gpt_oss",
        _SIZES
        | _LOCAL_EXPERTS
        | {"attention.sliding_window": "sliding_window", "expert_feed_forward_length": "intermediate_size"},
        _BLOCK | _NORM_AFTER_ATTENTION | {"ffn_gate_inp": "mlp.router"},
        (
            Change(
                "mlp.experts.gate_up_proj",
                ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                _interleaved_inputs_first,
            ),
            Change("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), _interleaved),
            Change("mlp.experts.down_proj", ("ffn_down_exps.weight",), _inputs_first),
            Change("mlp.experts.down_proj_bias", ("ffn_down_exps.bias",), _as_it_is),
            Change("self_attn.sinks", ("attn_sinks.weight",), _as_it_is),
        ),
        _gpt_oss,
    ),
    "gemma2": Family(
        "gemma2",
        _SIZES
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        _ATTENTION | _MLP | _FOUR_NORMS,
        (),
        _gemma_2,
        raised_norms=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        _SIZES
        | {
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": None,
        },
        _ATTENTION | _MLP | _FOUR_NORMS,
        (),
        _gemma_3,
        raised_norms=True,
    ),
    "gemma4": Family(
        "gemma4_text",
        _SIZES
        | {
            "attention.key_length": None,
            "attention.key_length_swa": "head_dim",
            "attention.sliding_window": "sliding_window",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        _ATTENTION
        | _MLP
        | _FOUR_NORMS
        | {
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "ffn_gate_inp": "router.proj",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        },
        (
            *_experts("experts"),
            Change("router.scale", ("ffn_gate_inp.scale",), _as_it_is),
            Change("router.per_expert_scale", ("ffn_down_exps.scale",), _as_it_is),
            Change("layer_scalar", ("layer_output_scale.weight",), _as_it_is),
        ),
        _gemma_4,
        OUTSIDE
        | {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        plain_rope=False,
    ),
    "phi3": Family(
        "phi3",
        _SIZES | {"attention.sliding_window": "sliding_window"},
        _BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        (),
        _phi_3,
        partial_rope=True,
    ),
    "lfm2": Family("lfm2", _LFM_2_SIZES, _LFM_2_BLOCK, _LFM_2_CHANGES, _lfm_2, _LFM_2_OUTSIDE),
    "lfm2moe": Family(
        "lfm2_moe",
        _LFM_2_SIZES | _EXPERTS | _EXPERT_WIDTH | {"leading_dense_block_count": "num_dense_layers"},
        _LFM_2_BLOCK | {"ffn_gate_inp": "feed_forward.gate"},
        (
            *_LFM_2_CHANGES,
            *_experts("feed_forward.experts"),
            Change("feed_forward.expert_bias", ("exp_probs_b.bias",), _as_it_is),
        ),
        _lfm_2_moe,
        _LFM_2_OUTSIDE,
    ),
    "deepseek2": _deepseek,
    "deepseek32": Family(
        "deepseek_v32",
        _DEEPSEEK_SIZES | _INDEXER_SIZES,
        _DEEPSEEK_BLOCK | _INDEXER,
        _DEEPSEEK_CHANGES,
        _deepseek_3,
        plain_rope=False,
    ),
    "glm-dsa": Family(
        "glm_moe_dsa",
        _DEEPSEEK_SIZES | _INDEXER_SIZES,
        _DEEPSEEK_BLOCK | _INDEXER,
        _DEEPSEEK_CHANGES,
        _glm_dsa,
        plain_rope=False,
    ),
    "glm4": Family(
        "glm4",
        _SIZES,
        _BLOCK
        | {
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        (),
        _biases,
        partial_rope=True,
    ),
    "glm4moe": Family(
        "glm4_moe",
        _SIZES
        | _EXPERT_WIDTH
        | {
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "leading_dense_block_count": "first_k_dense_replace",
        },
        _BLOCK | _NORM_AFTER_ATTENTION | _ROUTER | _shared("mlp.shared_experts"),
        _DEEPSEEK_CHANGES[:-1],
        _glm_4_moe,
        partial_rope=True,
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "granite": Family("granite", _SIZES | _GRANITE, _BLOCK, LLAMA_ORDER, _llama),
    "granitemoe": _dense_or_moe_granite,
    "granitehybrid": _dense_or_moe_granite,
    "llama4": Family(
        "llama4_text",
        _SIZES
        | _LOCAL_EXPERTS
        | {
            "feed_forward_length": "intermediate_size_mlp",
            "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        _ATTENTION
        | {
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
            "ffn_gate_inp": "feed_forward.router",
        }
        | _shared("feed_forward.shared_expert"),
        (
            Change(
                "feed_forward.experts.gate_up_proj",
                ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
                _joined_inputs_first,
            ),
            Change("feed_forward.experts.down_proj", ("ffn_down_exps.weight",), _inputs_first),
        ),
        _llama_4,
    ),
    "minimax-m2": Family(
        "minimax_m2",
        _SIZES | _LOCAL_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        _BLOCK | {"ffn_gate_inp": "block_sparse_moe.gate"},
        (
            *_experts("mlp.experts"),
            Change("block_sparse_moe.e_score_correction_bias", ("exp_probs_b.bias",), _as_it_is),
        ),
        _minimax_m2,
        partial_rope=True,
    ),
    "stablelm": Family(
        "stablelm",
        _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        _BLOCK,
        (),
        lambda found, metadata: found.update(use_qkv_bias=_has(metadata, "attn_q.bias")),
        partial_rope=True,
    ),
}
"""By the names that llama.cpp gives to architectures."""
