"""Which model families can be cut into spans, and what is special about some of them: data, no model code.

A family is transformers' `model_type` of the text model. A family that is not named here is tried if it is a
decoder-only causal language model: it runs sequence by sequence with its own attention. Its blocks must stand in one
list, leave nothing but keys and values in the cache, and the rest of the backbone must be one that can be made
neutral: that is checked while a span loads, so a family that needs more than this file says is refused, not run wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from splitnet.errors import UnsupportedModel

PACKS = frozenset(
    {
        *("apertus", "arcee", "codegen", "cohere", "cohere2", "cwm", "deepseek_v3", "ernie4_5", "ernie4_5_moe"),
        *("exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox"),
        *("gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama", "minimax_m2"),
        *("ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt"),
        *("persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
        "starcoder2",
    }
)
"""Families whose attention can be replaced by a packed one, so that sequences share a pass: each is in the tests."""

LEAN = frozenset({"llama", "mistral", "qwen2", "qwen3", "seed_oss"})
"""Families whose short steps need not run their own code, as their blocks do what Llama's do at every position: each is
in the tests. That parts have the same names is not enough: others leave the rotary embedding out in some blocks
(SmolLM3), or scale queries far from the beginning (Ministral 3), which no short trial shows."""

ONE_WINDOW = frozenset({"mistral"})
"""Those of them in which a sliding window of the config is that of all blocks; others must say which blocks have it."""

REFUSED: Mapping[str, str] = {
    "gemma3n_text": "its blocks share states with each other besides the hidden state",
    "gemma4_text": "its blocks share states with each other besides the hidden state",
}
"""Families that cannot be cut, and why, where the config does not tell."""

ADDED_POSITIONS = ("wpe", "embed_positions")
"""Children of the module that holds the blocks whose output the backbone adds to the embeddings. The client does so;
in spans they give zero."""

NEUTRAL_CONFIG: Mapping[str, Any] = {"embedding_multiplier": 1.0}
"""Config values with which a backbone hands its input to the first block unchanged."""

PLAIN_LINEAR = frozenset({"FalconLinear"})
"""Families' own classes of linear layers that compute what torch's does: their weights may be held in other forms."""

ROUTERS = frozenset({"router", "gate"})
"""Names of modules that choose experts. They are small, and another choice changes more than a rounded weight."""

_OWN_ROPE_PER_SEQUENCE = {"dynamic", "longrope"}
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence: not shared by a pack."""

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def check_can_be_cut(config: PreTrainedConfig) -> None:
    """Refuses a text model that cannot be cut into spans.

    Raises:
        UnsupportedModel: the message names the family and says why.
    """
    reason = REFUSED.get(config.model_type) or _reason_against(config)
    if reason:
        raise UnsupportedModel(
            f"models of the family {config.model_type!r} cannot be cut into spans: {reason}. Use a decoder-only model "
            "such as Llama, Qwen or Gemma"
        )


def packs_sequences(config: PreTrainedConfig) -> bool:
    """Whether several sequences can share one pass through the backbone; if not they run one after the other."""
    return config.model_type in PACKS and not _rope_types(config) & _OWN_ROPE_PER_SEQUENCE


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Per block its sliding window in positions, or None; empty if the config does not tell blocks apart."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _reason_against(config: PreTrainedConfig) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if hasattr(config, "type_vocab_size"):
        return "it is a bidirectional encoder"
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        return "its config does not say how many blocks it has"
    if not hasattr(config, "num_attention_heads"):
        return "its blocks keep a recurrent state instead of a KV cache"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its blocks share KV caches with each other"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES)
    if others:
        return f"it has blocks of the kind {others[0]!r}, whose state cannot be rewound"
    return ""


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}
