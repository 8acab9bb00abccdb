"""The families of GGUF files: how their metadata and tensors correspond to transformers'.

This module undoes the changes that llama.cpp's converters (the package `conversion` of its repository) make to a
checkpoint: reordered rows, norms stored plus one, and joined, split or negated tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from splitnet.checkpoint.gguf.config import Metadata, rope_parameters
from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.errors import UnsupportedModel

Values = dict[str, Any]  # of a config
Make = Callable[..., torch.Tensor]  # makes a tensor from the config and tensors of the file
_SOFTMAX, _SIGMOID = 1, 2  # values of `expert_gating_func`


def names_of(text: str) -> dict[str, str]:
    """`a=b c=` -> {"a": "b", "c": ""}."""
    return {key: name for key, _, name in (pair.partition("=") for pair in text.split())}


_OUTSIDE = names_of("token_embd=model.embed_tokens output_norm=model.norm output=lm_head")
FURTHER_TOKENS = names_of(
    "nextn.enorm=enorm nextn.hnorm=hnorm nextn.eh_proj=eh_proj nextn.shared_head_norm=shared_head.norm "
    "nextn.embed_tokens=embed_tokens nextn.shared_head_head=shared_head.head"
)
"""As `GgufArchitecture.tensors`, for the modules around the block in a layer that predicts further tokens."""


class Change(NamedTuple):
    """A tensor of transformers that is not a renamed tensor of the file."""

    name: str  # within the block
    parts: str  # names of the tensors of the file, within the block; all are needed to make it
    make: Make  # makes the tensor from the parts; also called with parts on the meta device
    keeps_codes: bool = True  # whether codes stay codes


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of GGUF files."""

    model_type: str  # the family, as transformers names it
    # Key of the metadata -> field of the config. Empty: the key is known, and is read elsewhere or has no effect.
    fields: dict[str, str]
    # Module of a block in the file -> module in transformers, for its weight and bias, or tensor -> tensor.
    tensors: dict[str, str]
    changes: tuple[Change, ...] = ()  # tensors that are not only renamed
    # Sets config values that `fields`, `has` and `values` cannot express.
    settle: Callable[[Values, Metadata], None] | None = None
    # Field of the config -> tensor; true if any block has the tensor.
    has: dict[str, str] = field(default_factory=dict[str, str])
    values: Mapping[str, Any] = field(default_factory=Values)  # config values, unless the file has other values
    gating: int | None = None  # the family's value of `expert_gating_func`; None: its files lack this key
    outside: dict[str, str] = field(default_factory=lambda: _OUTSIDE)  # as `tensors`, for modules outside of blocks
    outside_changes: tuple[Change, ...] = ()  # as `changes`
    container: str = "model.layers"  # the part of names before the number of a block in transformers
    partial_rope: bool = False  # whether heads may be rotated in part
    plain_rope: bool = True  # whether `rope_parameters` describes its rotary embedding
    raised_norms: bool = False  # whether the file stores the weights of norms plus one


def family_of(file: GgufFile) -> GgufArchitecture:
    """The family of a file. Raises UnsupportedModel: it is unknown."""
    found = FAMILIES.get(file.architecture)
    if found is None:
        raise UnsupportedModel(
            f"{file.name} holds a model of the architecture {file.architecture!r}, which splitnet does not read from "
            "GGUF files: take its safetensors"
        )
    return found(file) if callable(found) else found


def config_values(family: GgufArchitecture, file: GgufFile) -> Values:
    """The config values from the metadata. Raises UnsupportedModel: something is missing or unknown."""
    metadata = Metadata(file)
    values = dict(family.values)
    for key, name in family.fields.items():
        value = metadata.get(key)
        if name and value is not None:
            values[name] = value
    further = metadata.get("nextn_predict_layers", 0)
    values["num_hidden_layers"] = metadata["block_count"] - further
    if further:
        values["num_nextn_predict_layers"] = further
    if "head_dim" in family.fields.values():
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if family.plain_rope:
        values["rope_parameters"] = rope_parameters(metadata, head_dim=values["head_dim"], partial=family.partial_rope)
    for name, tensor in family.has.items():
        values[name] = any(one.startswith("blk.") and one.endswith(f".{tensor}") for one in file.tensors)
    if family.settle is not None:
        family.settle(values, metadata)
    if family.gating is not None and metadata.get("expert_gating_func", family.gating) != family.gating:
        raise UnsupportedModel(
            f"{file.name} chooses experts in another way than its family: take another file of this model"
        )
    metadata.check_all_used()
    return values


def _blocks_with(metadata: Metadata, count: int, kinds: Mapping[str, str]) -> list[str]:
    """The kind of each block: the kind of the first of these modules that it has."""
    names = metadata.file.tensors
    blocks = [[kind for one, kind in kinds.items() if f"blk.{i}.{one}.weight" in names] for i in range(count)]
    if [] in blocks:
        raise ValueError(f"block {blocks.index([])} has none of {', '.join(kinds)}")
    return [found[0] for found in blocks]


# Functions that reorder rows and columns.


def _halves_apart(heads: str) -> Make:
    """Undoes llama.cpp's order for Llama, which interleaves the two halves of a head that are rotated together."""

    def make(config: Any, rows: torch.Tensor) -> torch.Tensor:
        order = torch.arange(rows.shape[0]).view(getattr(config, heads), -1, 2).transpose(1, 2).flatten()
        return rows.index_select(0, order)

    return make


_LLAMA_ORDER = tuple(
    Change(f"self_attn.{name}_proj.{kind}", f"attn_{name}.{kind}", _halves_apart(heads))
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in ("weight", "bias")
)


def _value_rows(width: str, after_keys: bool = False, dim: int = 0) -> Make:
    """Groups value heads by their key head, where llama.cpp interleaves them. `width`: field of the config with the
    rows (or columns) of a head; empty: one. `after_keys`: whether queries and keys come before the values."""

    def make(config: Any, rows: torch.Tensor) -> torch.Tensor:
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        before = 2 * keys * config.linear_key_head_dim if after_keys else 0
        own = torch.arange(rows.shape[dim] - before).view(values // keys, keys, getattr(config, width) if width else 1)
        order = before + own.transpose(0, 1).flatten()
        return rows.index_select(dim, torch.cat([torch.arange(before), order]))

    return make


def _queries_to_gates(config: Any, rest: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Queries, keys, values and gates of all heads -> those of the first key head, of the second, and so on."""
    heads, key = config.linear_num_key_heads, config.linear_key_head_dim
    value = config.linear_num_value_heads // heads * config.linear_value_head_dim
    both = torch.cat([rest, gates])
    parts = torch.arange(len(both)).split([heads * width for width in (key, key, value, value)])
    order = torch.cat([part.view(heads, -1) for part in parts], dim=1).flatten()
    return both.index_select(0, order)


# Functions that join, split or compute tensors.


def _then(first: Make, second: Make) -> Make:
    return lambda config, *parts: second(config, first(config, *parts))


def joined(config: Any, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def _joined_experts(config: Any, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def _interleaved(config: Any, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    order = torch.arange(2 * gates.shape[1]).view(2, gates.shape[1]).transpose(0, 1).flatten()
    return torch.cat([gates, ups], dim=1).index_select(1, order)


def _inputs_first(config: Any, experts: torch.Tensor) -> torch.Tensor:
    return experts.transpose(1, 2)


def _channels(config: Any, kernel: torch.Tensor) -> torch.Tensor:
    return kernel.reshape(kernel.shape[0], 1, -1)


def _flat(config: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def _log_of_decay(config: Any, decay: torch.Tensor) -> torch.Tensor:
    return torch.log(-decay.reshape(-1))


def _keys_and_values(config: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The two halves of `kv_b_proj`, by heads; the file stores the keys' half transposed."""
    whole = torch.cat([keys.transpose(1, 2), values], dim=1)
    return whole.reshape(-1, whole.shape[-1])


# Functions that set config values that no single key gives.


def _gemma(found: Values, *, widest: int) -> None:
    """Sets the divisor of scores, which is different for the largest Gemma of each generation, with `widest` blocks."""
    wide = found["num_hidden_layers"] == widest
    width = found["hidden_size"] // found["num_attention_heads"] if wide else found["head_dim"]
    found["query_pre_attn_scalar"] = width


def _near_rope(metadata: Metadata) -> Values:
    return {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10_000.0)}


def _gemma_3(found: Values, metadata: Metadata) -> None:
    _gemma(found, widest=62)
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": _near_rope(metadata)}


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
    names = metadata.file.tensors
    found["vocab_size_per_layer_input"] = names["token_embd.weight"].shape[0]
    own = range(found["num_hidden_layers"] - found["num_kv_shared_layers"])
    found["attention_k_eq_v"] = any(f"blk.{block}.attn_v.weight" not in names for block in own)
    found["enable_moe_block"] = "num_experts" in found
    turned = names["rope_freqs.weight"].tensor() == 1 if "rope_freqs.weight" in names else torch.ones(1)
    far = {"rope_type": "proportional", "rope_theta": metadata["rope.freq_base"]}
    far["partial_rotary_factor"] = float(turned.float().mean())
    found["rope_parameters"] = {"full_attention": far, "sliding_attention": _near_rope(metadata)}


def _phi_3(found: Values, metadata: Metadata) -> None:
    positions = metadata.get("rope.scaling.original_context_length")
    found["original_max_position_embeddings"] = positions or found["max_position_embeddings"]
    found["sliding_window"] = found.get("sliding_window") or None  # 0 means no window


def _lfm_2(found: Values, metadata: Metadata) -> None:
    heads = found["num_key_value_heads"]
    found["layer_types"] = ["full_attention" if count else "conv" for count in heads][: found["num_hidden_layers"]]
    found["num_key_value_heads"] = max(heads)


def _latent_attention(found: Values, metadata: Metadata) -> None:
    """DeepSeek's attention: keys and values of all heads come from one latent vector."""
    found["num_key_value_heads"] = found["num_attention_heads"]
    found["qk_rope_head_dim"] = turned = metadata["rope.dimension_count"]
    whole = metadata.get("attention.key_length_mla", metadata.get("attention.key_length"))
    found["qk_nope_head_dim"] = whole - turned
    found["v_head_dim"] = metadata.get("attention.value_length_mla", metadata.get("attention.value_length"))
    found["rope_parameters"] = rope = rope_parameters(metadata, head_dim=turned)
    if "rope.scaling.yarn_log_multiplier" in metadata:
        # The converter multiplies the value by 0.1; in all published models both values are equal.
        scale = round(10 * metadata["rope.scaling.yarn_log_multiplier"], 6)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    # Files of 2025 lack the numbers of groups; only DeepSeek V3 has 256 experts.
    groups = (8, 4) if found["n_routed_experts"] == 256 and metadata.file.architecture == "deepseek2" else (1, 1)
    found.setdefault("n_group", groups[0])
    found.setdefault("topk_group", groups[1])


def _deepseek_2(found: Values, metadata: Metadata) -> None:
    _latent_attention(found, metadata)
    found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"


def _glm_dsa(found: Values, metadata: Metadata) -> None:
    _latent_attention(found, metadata)
    if "attention.indexer.types" in metadata:
        whole = metadata["attention.indexer.types"]
        found["indexer_types"] = ["full" if one else "shared" for one in whole][: found["num_hidden_layers"]]


def _gated_delta(found: Values, metadata: Metadata) -> None:
    """Linear attention in most blocks, full attention in some."""
    found["linear_value_head_dim"] = metadata["ssm.inner_size"] // found["linear_num_value_heads"]
    kinds = {"ssm_out": "linear_attention", "attn_q": "full_attention"}
    found["layer_types"] = _blocks_with(metadata, found["num_hidden_layers"], kinds)


def _axes(found: Values, metadata: Metadata) -> None:
    """Sets how many numbers of a head each axis of a rotary position rotates: time, height, width."""
    found["rope_parameters"]["mrope_section"] = [size for size in metadata["rope.dimension_sections"] if size]


def _interleaved_axes(found: Values, metadata: Metadata) -> None:
    _axes(found, metadata)
    found["rope_parameters"]["mrope_interleaved"] = True


def _side_by_side_axes(found: Values, metadata: Metadata) -> None:
    _axes(found, metadata)
    if 2 * sum(sections := found["rope_parameters"]["mrope_section"]) != found["head_dim"]:
        raise ValueError(f"rope.dimension_sections {sections} do not rotate {found['head_dim']} numbers of a head")


def _qwen_3_5(found: Values, metadata: Metadata) -> None:
    _gated_delta(found, metadata)
    _interleaved_axes(found, metadata)


def _mamba_blocks(found: Values, metadata: Metadata) -> None:
    found["num_key_value_heads"] = max(found["num_key_value_heads"]) or found["num_attention_heads"]
    keys = [one for name, one in metadata.file.tensors.items() if name.endswith(".attn_k.weight")]
    if keys:
        found["num_key_value_heads"] = keys[0].shape[0] // found["head_dim"]


def _nemotron_h(found: Values, metadata: Metadata) -> None:
    _mamba_blocks(found, metadata)
    kinds = {"ssm_in": "linear_attention", "attn_q": "full_attention", "ffn_up_exps": "moe", "ffn_up": "mlp"}
    found["layers_block_type"] = _blocks_with(metadata, found.pop("num_hidden_layers"), kinds)
    found["mamba_head_dim"] = metadata["ssm.inner_size"] // found["mamba_num_heads"]
    found["expand"] = max(1, metadata["ssm.inner_size"] // found["hidden_size"])
    dense = [one.shape[0] for name, one in metadata.file.tensors.items() if name.endswith(".ffn_up.weight")]
    found["intermediate_size"] = dense[0] if dense else max(found["intermediate_size"])


def _granite_hybrid(found: Values, metadata: Metadata) -> None:
    _mamba_blocks(found, metadata)
    kinds = {"ssm_in": "linear_attention", "attn_q": "full_attention"}
    found["layer_types"] = _blocks_with(metadata, found["num_hidden_layers"], kinds)
    found["mamba_d_head"] = metadata["ssm.inner_size"] // found["mamba_n_heads"]
    found["mamba_expand"] = metadata["ssm.inner_size"] // found["hidden_size"]
    found["position_embedding_type"] = "rope" if metadata.get("rope.scaling.finetuned", True) else "nope"
    if not found["num_local_experts"]:
        found["shared_intermediate_size"] = found["intermediate_size"]


def _llama_4(found: Values, metadata: Metadata) -> None:
    if not found.get("intermediate_size"):
        found["intermediate_size"] = found["intermediate_size_mlp"]
    # Scout normalises queries and keys, Maverick does not; a file shows the difference only by the number of experts.
    found["use_qk_norm"] = found["num_local_experts"] != 128


def _ministral_3(found: Values, metadata: Metadata) -> None:
    rope = found["rope_parameters"]
    if "attention.temperature_scale" in metadata:
        rope["llama_4_scaling_beta"] = metadata["attention.temperature_scale"]
    if "rope.scaling.yarn_log_multiplier" in metadata:
        rope |= {"mscale": 1.0, "mscale_all_dim": metadata["rope.scaling.yarn_log_multiplier"]}


# The table. Rows extend other rows; texts are `key of the metadata=field` or `name in the file=name in transformers`.


def _like(
    row: GgufArchitecture,
    model_type: str,
    fields: str = "",
    tensors: str = "",
    changes: tuple[Change, ...] = (),
    **others: Any,
) -> GgufArchitecture:
    """A row that extends `row`; `others` replace attributes of `row`."""
    both = {"fields": row.fields | names_of(fields), "tensors": row.tensors | names_of(tensors)}
    return replace(row, model_type=model_type, changes=(*row.changes, *changes), **both, **others)


def _shared(path: str) -> str:
    """Modules of a shared expert, which all positions use."""
    return " ".join(f"ffn_{kind}_shexp={path}.{kind}_proj" for kind in ("gate", "up", "down"))


def _experts(path: str, router: str) -> str:
    return f"ffn_gate_inp={router} ffn_gate_up_exps.weight={path}.gate_up_proj ffn_down_exps.weight={path}.down_proj "


def _stacked(path: str, make: Make = _joined_experts) -> Change:
    """Experts that transformers stacks, with gates above ups."""
    return Change(f"{path}.gate_up_proj", "ffn_gate_exps.weight ffn_up_exps.weight", make)


_ATTENTION = (
    "attn_norm=input_layernorm attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
    "attn_output=self_attn.o_proj attn_q_norm=self_attn.q_norm attn_k_norm=self_attn.k_norm "
    "ffn_norm=post_attention_layernorm "
)
_NORM_AFTER_ATTENTION = "post_attention_norm=post_attention_layernorm "
_FOUR_NORMS = _NORM_AFTER_ATTENTION + "ffn_norm=pre_feedforward_layernorm post_ffw_norm=post_feedforward_layernorm "
_WINDOW = "attention.sliding_window=sliding_window "
_SOFTCAP = "final_logit_softcapping=final_logit_softcapping "
_LOCAL_EXPERTS = "expert_count=num_local_experts expert_used_count=num_experts_per_tok "
_ROUTED_EXPERTS = (
    "expert_count=n_routed_experts expert_shared_count=n_shared_experts expert_weights_scale=routed_scaling_factor "
    "expert_weights_norm=norm_topk_prob expert_group_count=n_group expert_group_used_count=topk_group "
)
_CORRECTED = "exp_probs_b.bias=mlp.gate.e_score_correction_bias "
_BIASES = {"attention_bias": "attn_q.bias"}

_DENSE = GgufArchitecture(
    "",
    names_of(
        "context_length=max_position_embeddings embedding_length=hidden_size feed_forward_length=intermediate_size "
        "attention.head_count=num_attention_heads attention.head_count_kv=num_key_value_heads "
        "attention.key_length=head_dim attention.layer_norm_rms_epsilon=rms_norm_eps"
    ),
    names_of(_ATTENTION + "ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj"),
)
_MOE = _like(
    _DENSE,
    "",
    "expert_count=num_experts expert_used_count=num_experts_per_tok expert_feed_forward_length=moe_intermediate_size",
    _experts("mlp.experts", "mlp.gate"),
    (_stacked("mlp.experts"),),
)
_LLAMA = _like(_DENSE, "llama", changes=_LLAMA_ORDER, has=_BIASES | {"mlp_bias": "ffn_down.bias"})
_MIXTRAL = _like(
    _DENSE, "mixtral", _LOCAL_EXPERTS, _experts("mlp.experts", "mlp.gate"), (*_LLAMA_ORDER, _stacked("mlp.experts"))
)
_QWEN_2_MOE = _like(
    _MOE,
    "qwen2_moe",
    "expert_shared_feed_forward_length=shared_expert_intermediate_size",
    _shared("mlp.shared_expert"),
    (Change("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", lambda config, row: row.reshape(1, -1)),),
)
_QWEN_3_MOE = _like(_MOE, "qwen3_moe", values={"norm_topk_prob": True})
_QWEN_3_VL = "rope.dimension_sections= n_deepstack_layers="
"""Keys about images; with text alone the model is Qwen3."""
_DELTA_SIZES = (
    "ssm.conv_kernel=linear_conv_kernel_dim ssm.state_size=linear_key_head_dim ssm.group_count=linear_num_key_heads "
    "ssm.time_step_rank=linear_num_value_heads "
)
_DELTA_BLOCK = _NORM_AFTER_ATTENTION + "ssm_norm=linear_attn.norm "
_DELTA = {"settle": _gated_delta, "partial_rope": True, "raised_norms": True}
_QWEN_3_5_CHANGES = tuple(
    Change(f"linear_attn.{name}", part, make)
    for name, part, make in (
        ("in_proj_qkv.weight", "attn_qkv.weight", _value_rows("linear_value_head_dim", after_keys=True)),
        ("in_proj_z.weight", "attn_gate.weight", _value_rows("linear_value_head_dim")),
        ("in_proj_a.weight", "ssm_alpha.weight", _value_rows("")),
        ("in_proj_b.weight", "ssm_beta.weight", _value_rows("")),
        ("dt_bias", "ssm_dt.bias", _value_rows("")),
        ("A_log", "ssm_a", _then(_log_of_decay, _value_rows(""))),
        ("conv1d.weight", "ssm_conv1d.weight", _then(_value_rows("linear_value_head_dim", after_keys=True), _channels)),
        ("out_proj.weight", "ssm_out.weight", _value_rows("linear_value_head_dim", dim=1)),
    )
)
_LFM_2 = _like(
    _DENSE,
    "lfm2",
    "shortconv.l_cache=conv_L_cache attention.layer_norm_rms_epsilon=norm_eps",
    "attn_norm=operator_norm attn_output=self_attn.out_proj attn_q_norm=self_attn.q_layernorm "
    "attn_k_norm=self_attn.k_layernorm ffn_norm=ffn_norm ffn_gate=feed_forward.w1 ffn_down=feed_forward.w2 "
    "ffn_up=feed_forward.w3 shortconv.in_proj=conv.in_proj shortconv.out_proj=conv.out_proj "
    "shortconv.conv.bias=conv.conv.bias",
    (Change("conv.conv.weight", "shortconv.conv.weight", _channels),),
    settle=_lfm_2,
    has={"conv_bias": "shortconv.in_proj.bias"},
    values={"block_auto_adjust_ff_dim": False},
    outside=_OUTSIDE | names_of("token_embd_norm=model.embedding_norm output_norm=model.embedding_norm"),
)
_DEEPSEEK_3 = _like(
    _MOE,
    "deepseek_v3",
    _ROUTED_EXPERTS + "leading_dense_block_count=first_k_dense_replace attention.q_lora_rank=q_lora_rank "
    "attention.kv_lora_rank=kv_lora_rank attention.key_length=",
    _CORRECTED + _shared("mlp.shared_experts") + " attn_q_a=self_attn.q_a_proj attn_q_a_norm=self_attn.q_a_layernorm "
    "attn_q_b=self_attn.q_b_proj attn_kv_a_mqa=self_attn.kv_a_proj_with_mqa attn_kv_b=self_attn.kv_b_proj "
    "attn_kv_a_norm=self_attn.kv_a_layernorm",
    (Change("self_attn.kv_b_proj.weight", "attn_k_b.weight attn_v_b.weight", _keys_and_values, keeps_codes=False),),
    settle=_latent_attention,
    values={"q_lora_rank": None, "norm_topk_prob": False},
    gating=_SIGMOID,
    plain_rope=False,
)
_DEEPSEEK_2 = replace(_DEEPSEEK_3, model_type="deepseek_v2", settle=_deepseek_2, gating=_SOFTMAX)
_DEEPSEEK_32 = _like(
    _DEEPSEEK_3,
    "deepseek_v32",
    "attention.indexer.head_count=index_n_heads attention.indexer.key_length=index_head_dim "
    "attention.indexer.top_k=index_topk",
    "indexer.k_norm=self_attn.indexer.k_norm indexer.proj=self_attn.indexer.weights_proj "
    "indexer.attn_k=self_attn.indexer.wk indexer.attn_q_b=self_attn.indexer.wq_b",
)


def _deepseek(file: GgufFile) -> GgufArchitecture:
    third = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    return _DEEPSEEK_3 if third or file.of_architecture.get("expert_gating_func") == _SIGMOID else _DEEPSEEK_2


def _mamba(path: str) -> str:
    return (
        f"ssm_in={path}.in_proj ssm_out={path}.out_proj ssm_dt.bias={path}.dt_bias ssm_conv1d.bias={path}.conv1d.bias "
    )


def _mamba_changes(path: str) -> tuple[Change, ...]:
    return (
        Change(f"{path}.A_log", "ssm_a", _log_of_decay),
        Change(f"{path}.D", "ssm_d", _flat),
        Change(f"{path}.conv1d.weight", "ssm_conv1d.weight", _channels),
        Change(f"{path}.norm.weight", "ssm_norm.weight", _flat),
    )


_NEMOTRON_H = _like(
    replace(_MOE, tensors={}, changes=_mamba_changes("mixer")),
    "nemotron_h",
    _ROUTED_EXPERTS + "attention.layer_norm_epsilon=layer_norm_epsilon "
    "attention.layer_norm_rms_epsilon=layer_norm_epsilon ssm.conv_kernel=conv_kernel ssm.state_size=ssm_state_size "
    "ssm.group_count=n_groups ssm.time_step_rank=mamba_num_heads moe_latent_size=moe_latent_size "
    "expert_shared_feed_forward_length=moe_shared_expert_intermediate_size "
    "rope.freq_base= rope.dimension_count=",  # its attention rotates nothing
    _mamba("mixer") + "attn_norm=norm attn_q=mixer.q_proj attn_k=mixer.k_proj attn_v=mixer.v_proj "
    "attn_output=mixer.o_proj ffn_up=mixer.up_proj ffn_down=mixer.down_proj ffn_gate_inp=mixer.gate "
    "ffn_up_shexp=mixer.shared_experts.up_proj ffn_down_shexp=mixer.shared_experts.down_proj "
    "ffn_latent_down=mixer.fc1_latent_proj ffn_latent_up=mixer.fc2_latent_proj "
    "ffn_up_exps.weight=mixer.experts.up_proj ffn_down_exps.weight=mixer.experts.down_proj "
    "exp_probs_b.bias=mixer.gate.e_score_correction_bias",
    settle=_nemotron_h,
    has=names_of("use_conv_bias=ssm_conv1d.bias attention_bias=attn_q.bias mlp_bias=ffn_up.bias"),
    outside=names_of("token_embd=backbone.embeddings output_norm=backbone.norm_f output=lm_head"),
    container="backbone.layers",
    plain_rope=False,
)
_GRANITE = _like(
    _LLAMA,
    "granite",
    "attention.scale=attention_multiplier embedding_scale=embedding_multiplier residual_scale=residual_multiplier "
    "logit_scale=logits_scaling",
)
_GRANITE_MOE = _like(
    replace(_GRANITE, tensors=names_of(_ATTENTION), has=_BIASES),
    "granitemoe",
    _LOCAL_EXPERTS + "expert_shared_feed_forward_length=shared_intermediate_size",
    _experts("block_sparse_moe.experts", "block_sparse_moe.router")
    + "ffn_down_shexp.weight=shared_mlp.output_linear.weight ffn_down.weight=shared_mlp.output_linear.weight",
    (
        _stacked("block_sparse_moe.experts"),
        Change("shared_mlp.input_linear.weight", "ffn_gate_shexp.weight ffn_up_shexp.weight", joined),
        Change("shared_mlp.input_linear.weight", "ffn_gate.weight ffn_up.weight", joined),
    ),
)


def _granite_moe(file: GgufFile) -> GgufArchitecture:
    shared = "expert_shared_feed_forward_length" in file.of_architecture
    return replace(_GRANITE_MOE, model_type="granitemoeshared") if shared else _GRANITE_MOE


FAMILIES: Mapping[str, GgufArchitecture | Callable[[GgufFile], GgufArchitecture]] = {
    "llama": lambda file: _MIXTRAL if file.of_architecture.get("expert_count") else _LLAMA,
    "mistral3": _like(_DENSE, "ministral3", changes=_LLAMA_ORDER, settle=_ministral_3),
    "smollm3": _like(_DENSE, "smollm3", changes=_LLAMA_ORDER, has=_BIASES),
    "seed_oss": _like(
        _DENSE, "seed_oss", tensors=_NORM_AFTER_ATTENTION, has=_BIASES | {"attention_out_bias": "attn_output.bias"}
    ),
    "ernie4_5": _like(_DENSE, "ernie4_5"),
    "olmo2": _like(_DENSE, "olmo2", tensors=_FOUR_NORMS),
    "qwen2": _like(_DENSE, "qwen2"),
    "qwen2vl": _like(_DENSE, "qwen2_5_vl_text", settle=_side_by_side_axes),
    "qwen2moe": _QWEN_2_MOE,
    "qwen3": _like(_DENSE, "qwen3", has=_BIASES),
    "qwen3moe": _QWEN_3_MOE,
    "qwen3vl": _like(_DENSE, "qwen3_vl_text", _QWEN_3_VL, has=_BIASES, settle=_interleaved_axes),
    "qwen3vlmoe": _like(_QWEN_3_MOE, "qwen3_moe", _QWEN_3_VL),
    "qwen3next": _like(
        _QWEN_2_MOE,
        "qwen3_next",
        _DELTA_SIZES,
        _DELTA_BLOCK + "ssm_ba=linear_attn.in_proj_ba ssm_out=linear_attn.out_proj ssm_dt.bias=linear_attn.dt_bias",
        (
            Change("linear_attn.in_proj_qkvz.weight", "attn_qkv.weight attn_gate.weight", _queries_to_gates),
            Change("linear_attn.A_log", "ssm_a", _log_of_decay),
            Change("linear_attn.conv1d.weight", "ssm_conv1d.weight", _channels),
        ),
        **_DELTA,
    ),
    "qwen35": _like(
        _DENSE,
        "qwen3_5_text",
        _DELTA_SIZES + "expert_shared_feed_forward_length=",
        _DELTA_BLOCK,
        _QWEN_3_5_CHANGES,
        **_DELTA | {"settle": _qwen_3_5},
    ),
    "qwen35moe": _like(
        _QWEN_2_MOE, "qwen3_5_moe_text", _DELTA_SIZES, _DELTA_BLOCK, _QWEN_3_5_CHANGES, **_DELTA | {"settle": _qwen_3_5}
    ),
    "gpt-oss": _like(
        _DENSE,
        "gpt_oss",
        _LOCAL_EXPERTS + _WINDOW + "expert_feed_forward_length=intermediate_size",
        _NORM_AFTER_ATTENTION + "ffn_gate_inp=mlp.router attn_sinks.weight=self_attn.sinks "
        "ffn_down_exps.bias=mlp.experts.down_proj_bias",
        (
            _stacked("mlp.experts", _then(_interleaved, _inputs_first)),
            Change("mlp.experts.gate_up_proj_bias", "ffn_gate_exps.bias ffn_up_exps.bias", _interleaved),
            Change("mlp.experts.down_proj", "ffn_down_exps.weight", _inputs_first),
        ),
        settle=lambda found, metadata: found["rope_parameters"].setdefault("truncate", False),
        gating=_SOFTMAX,
    ),
    "gemma2": _like(
        _DENSE,
        "gemma2",
        _WINDOW + _SOFTCAP + "attn_logit_softcapping=attn_logit_softcapping",
        _FOUR_NORMS,
        settle=lambda found, metadata: _gemma(found, widest=46),
        raised_norms=True,
    ),
    "gemma3": _like(
        _DENSE,
        "gemma3_text",
        _WINDOW + _SOFTCAP + "attention.sliding_window_pattern=",
        _FOUR_NORMS,
        settle=_gemma_3,
        raised_norms=True,
    ),
    "gemma4": _like(
        _DENSE,
        "gemma4_text",
        _WINDOW + _SOFTCAP + "attention.key_length= attention.key_length_swa=head_dim rope.dimension_count= "
        "attention.shared_kv_layers=num_kv_shared_layers rope.dimension_count_swa= attention.value_length_swa= "
        "embedding_length_per_layer_input=hidden_size_per_layer_input expert_count=num_experts "
        "expert_used_count=top_k_experts expert_feed_forward_length=moe_intermediate_size",
        _FOUR_NORMS + _experts("experts", "router.proj") + "post_ffw_norm_1=post_feedforward_layernorm_1 "
        "post_ffw_norm_2=post_feedforward_layernorm_2 pre_ffw_norm_2=pre_feedforward_layernorm_2 "
        "inp_gate=per_layer_input_gate proj=per_layer_projection post_norm=post_per_layer_input_norm "
        "ffn_gate_inp.scale=router.scale ffn_down_exps.scale=router.per_expert_scale "
        "layer_output_scale.weight=layer_scalar",
        (_stacked("experts"),),
        settle=_gemma_4,
        outside=_OUTSIDE
        | names_of(
            "per_layer_token_embd=model.embed_tokens_per_layer per_layer_model_proj=model.per_layer_model_projection "
            "per_layer_proj_norm=model.per_layer_projection_norm"
        ),
        plain_rope=False,
    ),
    "phi3": _like(
        _DENSE, "phi3", _WINDOW, "attn_qkv=self_attn.qkv_proj ffn_up=mlp.gate_up_proj", settle=_phi_3, partial_rope=True
    ),
    "lfm2": _LFM_2,
    "lfm2moe": _like(
        _LFM_2,
        "lfm2_moe",
        "expert_count=num_experts expert_used_count=num_experts_per_tok "
        "expert_feed_forward_length=moe_intermediate_size leading_dense_block_count=num_dense_layers",
        _experts("feed_forward.experts", "feed_forward.gate") + "exp_probs_b.bias=feed_forward.expert_bias",
        (_stacked("feed_forward.experts"),),
        has=_LFM_2.has | {"use_expert_bias": "exp_probs_b.bias"},
        gating=_SIGMOID,
    ),
    "deepseek2": _deepseek,
    "deepseek32": _DEEPSEEK_32,
    "glm-dsa": replace(_DEEPSEEK_32, model_type="glm_moe_dsa", settle=_glm_dsa),
    "glm4": _like(
        _DENSE,
        "glm4",
        tensors="ffn_up=mlp.gate_up_proj post_attention_norm=post_self_attn_layernorm post_ffw_norm=post_mlp_layernorm",
        has=_BIASES,
        partial_rope=True,
    ),
    "glm4moe": _like(
        _MOE,
        "glm4_moe",
        _ROUTED_EXPERTS + "leading_dense_block_count=first_k_dense_replace",
        _CORRECTED + _NORM_AFTER_ATTENTION + _shared("mlp.shared_experts"),
        has=_BIASES | {"use_qk_norm": "attn_q_norm.weight"},
        values={"n_group": 1, "topk_group": 1},
        gating=_SIGMOID,
        partial_rope=True,
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "granite": _GRANITE,
    "granitemoe": _granite_moe,
    "granitehybrid": _like(
        _GRANITE_MOE,
        "granitemoehybrid",
        "ssm.conv_kernel=mamba_d_conv ssm.state_size=mamba_d_state ssm.group_count=mamba_n_groups "
        "ssm.time_step_rank=mamba_n_heads",
        _mamba("mamba"),
        _mamba_changes("mamba"),
        settle=_granite_hybrid,
        has={"mamba_conv_bias": "ssm_conv1d.bias"},
        values={"num_local_experts": 0},
    ),
    "llama4": _like(
        _DENSE,
        "llama4_text",
        _LOCAL_EXPERTS + "feed_forward_length=intermediate_size_mlp expert_feed_forward_length=intermediate_size "
        "interleave_moe_layer_step=interleave_moe_layer_step",
        _shared("feed_forward.shared_expert") + " ffn_gate=feed_forward.gate_proj ffn_up=feed_forward.up_proj "
        "ffn_down=feed_forward.down_proj ffn_gate_inp=feed_forward.router",
        (
            _stacked("feed_forward.experts", _then(_joined_experts, _inputs_first)),
            Change("feed_forward.experts.down_proj", "ffn_down_exps.weight", _inputs_first),
        ),
        settle=_llama_4,
    ),
    "minimax-m2": _like(
        _MOE,
        "minimax_m2",
        "expert_count=num_local_experts expert_feed_forward_length=intermediate_size",
        "ffn_gate_inp=block_sparse_moe.gate exp_probs_b.bias=block_sparse_moe.e_score_correction_bias",
        settle=lambda found, metadata: found.update(rotary_dim=metadata["rope.dimension_count"]),
        gating=_SIGMOID,
        partial_rope=True,
    ),
    "stablelm": _like(
        _DENSE,
        "stablelm",
        "attention.layer_norm_epsilon=layer_norm_eps use_parallel_residual=use_parallel_residual",
        has={"use_qkv_bias": "attn_q.bias"},
        partial_rope=True,
    ),
}
"""Families by llama.cpp's names of architectures."""
