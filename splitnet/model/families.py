"""Which model families can be cut into spans, and what is special about a few of them: data, no model code.

A family is transformers' `model_type` of the text model. Families that are not named here are taken as standard:
a decoder-only causal language model whose blocks stand in one `ModuleList`, called one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from splitnet.errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """What is special about one family.

    Attributes:
        added_positions: children of the module that holds the blocks whose output the backbone *adds* to the
            embeddings (learned positions). The client adds them; in spans they give zero.
        neutral_config: config values that make the backbone pass its input to the first block unchanged.
        packs: whether the family's attention can be replaced by a packed one, where transformers does not say so.
        refused: why the family cannot be cut; empty if it can.
    """

    added_positions: tuple[str, ...] = ()
    neutral_config: Mapping[str, Any] = field(default_factory=dict)
    packs: bool | None = None
    refused: str = ""


_SHARED_STATE = Family(refused="its blocks share states with each other besides the hidden state")

FAMILIES: Mapping[str, Family] = {
    "gemma3n_text": _SHARED_STATE,
    "gemma4_text": _SHARED_STATE,
    "gpt2": Family(added_positions=("wpe",)),
    "gpt_bigcode": Family(added_positions=("wpe",)),
    "gpt_neo": Family(added_positions=("wpe",)),
    "granite": Family(neutral_config={"embedding_multiplier": 1.0}),
    "granitemoe": Family(neutral_config={"embedding_multiplier": 1.0}),
    "opt": Family(added_positions=("embed_positions",)),
    "stablelm": Family(packs=True),
}

_OWN_ROPE_PER_SEQUENCE = {"dynamic", "longrope"}
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence: not shared by a pack."""

_STANDARD = Family()
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a text model's config.

    Raises:
        UnsupportedModel: the family cannot be cut into spans; the message names it and says why.
    """
    name = config.model_type
    family = FAMILIES.get(name, _STANDARD)
    reason = family.refused or _reason_against(config)
    if reason:
        raise UnsupportedModel(
            f"models of the family {name!r} cannot be cut into spans: {reason}. Use a decoder-only model such as "
            "Llama, Qwen or Gemma"
        )
    return family


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
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are stored quantized; take a checkpoint with plain weights"
    return ""


def packs_sequences(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether several sequences can share one pass through the backbone; if not they run one after the other."""
    packs = family_of(config).packs
    if packs is None:
        packs = bool(getattr(model_class, "_supports_attention_backend", False))
    return packs and not _rope_types(config) & _OWN_ROPE_PER_SEQUENCE


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Per block its sliding window in positions, or None; empty if the config does not tell blocks apart."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}
