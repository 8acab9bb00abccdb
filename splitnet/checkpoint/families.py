"""Which model families can be cut into spans, what is special about some of them, and what their configs say.

A family is transformers' `model_type` of the text model. A family that is not named here is tried if it is a
decoder-only causal language model: it runs sequence by sequence with its own attention. Its blocks must stand in one
list, leave nothing but keys and values in the cache, and the rest of the backbone must be one that can be made
neutral: that is checked while a span loads, so a family that needs more than this file says is refused, not run wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from splitnet.errors import UnsupportedModel

MAX_LAYERS = 4096
"""As many as messages and records can number."""
MAX_LABELS = 1 << 13
"""Of which transformers makes a name each."""
MAX_LENGTH = 1 << 48
"""Longer than all sequences."""
_BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "swa_rope_theta")

PACKS = frozenset(
    {
        *("apertus", "arcee", "codegen", "cohere", "cohere2", "cwm", "deepseek_v3", "ernie4_5", "ernie4_5_moe"),
        *(
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gemma4_text",
            "glm",
            "glm4",
            "glm4_moe",
            "gpt2",
            "gpt_bigcode",
            "gpt_neox",
        ),
        *("gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama", "minimax_m2"),
        *("ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt"),
        *("persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
        *("solar_open", "starcoder2"),
    }
)
"""Families whose attention can be replaced by a packed one, so that sequences share a pass: each is in the tests."""

STATES = frozenset(
    {
        *(
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "kimi_linear",
            "lfm2",
            "lfm2_moe",
            "mamba",
        ),
        *("mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    }
)
"""Families with blocks that keep states besides keys and values, or nothing at all: each is in the tests. Their code
goes on from a state with many positions as with one by one, but for those of `ONE_BY_ONE`."""

ONE_BY_ONE = frozenset({"falcon_mamba", "jamba", "mamba"})
"""Those of them that forget the state before a step of several positions: these run one by one, behind the first
step."""

LEAN = frozenset(
    {
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss"),
        *("ernie4_5_moe", "glm4_moe", "gpt_oss", "minimax_m2", "olmoe", "solar_open"),
    }
)
"""Families whose short steps need not run their own code, as their blocks do what Llama's do at every position: each is
in the tests. That parts have the same names is not enough: others leave the rotary embedding out in some blocks
(SmolLM3), or scale queries far from the beginning (Ministral 3), which no short trial shows."""

COMPILED = LEAN | {
    *("apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "falcon", "gemma"),
    *("gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe"),
    *("helium", "hunyuan_v1_dense", "internlm3", "ministral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "opt"),
    *("persimmon", "phi", "phi3", "smollm3", "stablelm", "starcoder2"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
}
"""Families with compiled steps: `splitnet.blocks.fast.describe` knows all that their blocks do. Each is in the
tests."""

ONE_WINDOW = frozenset({"mistral", "mixtral", "olmoe", "phi3", "qwen3_moe", "starcoder2"})
"""Those of them in which a sliding window of the config is that of all blocks; others must say which blocks have it."""

SAME_AS: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Names of families in published configs that transformers has under another name."""

TEXT_ALONE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "glm4v_moe_text": ("glm4_moe", {"use_qk_norm": False}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen3_vl_moe_text": ("qwen3_vl_moe_alone", {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", {}),
}
"""Text models that transformers has only inside of multimodal ones: the family whose blocks do the same, and values of
its config."""
_HEADS_SHARE_HIDDEN = ("glm4v_text", "qwen2_5_vl_text", "qwen2_vl_text")
"""Those of them whose heads are as wide as hidden states by the number of heads, whatever their config says."""

REFUSED: Mapping[str, str] = {
    "deepseek_v4": "between its blocks there are several hidden states, and some blocks choose experts by the token",
    "zamba2": "some of its blocks have the same weights",
    "zamba": "some of its blocks have the same weights",
    "gemma3n_text": "its blocks share states with each other besides the hidden state",
}
"""Families that cannot be cut, and why, where the config does not tell."""

ADDED_POSITIONS = ("wpe", "embed_positions")
"""Children of the module that holds the blocks whose output the backbone adds to the embeddings. The client does so;
in spans they give zero."""

NEUTRAL_CONFIG: Mapping[str, Any] = {"embedding_multiplier": 1.0}
"""Config values with which a backbone hands its input to the first block unchanged."""

TAKEN_WEIGHTS = frozenset({"dt_proj"})
"""Linear layers that are never called, as the family's code multiplies by their weight itself: adapters that add to
their output would do nothing."""

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}

_OTHER_ATTENTION: Mapping[str, set[str]] = {
    "deepseek_v32": {"indexed_attention"},
    "glm_moe_dsa": {"indexed_attention"},
    "llama4_text": {"chunked_attention"},
}
"""Kinds of blocks of families that attend in a way of their own, to positions that are all kept."""


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model within that of a checkpoint.

    Where transformers has no causal language model of the text model alone, that of a family whose blocks do the same.
    """
    text = config.get_text_config()
    make_known(text)
    if text.model_type not in TEXT_ALONE:
        return text
    family, own = TEXT_ALONE[text.model_type]
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    # Without images the three positions of every token are equal, and the rotary embedding is that of the family.
    rope = {key: value for key, value in (text.rope_parameters or {}).items() if key[:5] not in ("mrope", "type")}
    values |= {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_type": "default"} | rope, **own}
    if text.model_type in _HEADS_SHARE_HIDDEN:
        values["head_dim"] = text.hidden_size // text.num_attention_heads
    return CONFIG_MAPPING[family](**values)


def make_known(config: PreTrainedConfig) -> None:
    """Before transformers' auto classes are asked: some text models are hidden in multimodal ones."""
    if config.model_type in ("step3p5", "qwen3_vl_moe_text"):
        from splitnet.checkpoint import text_models  # slow to import, and rarely wanted

        text_models.make_known()


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model without a head.

    Raises:
        UnsupportedModel: transformers has no causal language model of this family.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping or type(config) not in AutoModel._model_mapping:
        raise UnsupportedModel(f"models of the family {config.model_type!r} are not causal language models")
    return cast(type[PreTrainedModel], AutoModel._model_mapping[type(config)])


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model with its head; errors as `backbone_class`."""
    backbone_class(config)
    return cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[type(config)])


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model with a head that classifies whole sequences.

    Raises:
        UnsupportedModel: transformers has none of this family.
    """
    backbone_class(config)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedModel(
            f"transformers has no sequence classification for models of the family {config.model_type!r}: take a model "
            "of another family, such as Llama, Qwen or Gemma"
        )
    return cast(type[PreTrainedModel], AutoModelForSequenceClassification._model_mapping[type(config)])


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


class RopeLengths:
    """Which lengths of a sequence give a model the same frequencies.

    In transformers, all positions of a call get those of the length that the sequence then has, and keys that are
    cached keep theirs.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        kinds = _kinds(config)
        originals = [kind.get("original_max_position_embeddings") for kind in kinds if kind["rope_type"] == "longrope"]
        self._long = [end for end in originals if isinstance(end, int)]
        dynamic = any(kind["rope_type"] == "dynamic" for kind in kinds)
        most = getattr(config, "max_position_embeddings", None) if dynamic else None
        self._dynamic = most if isinstance(most, int) else None

    @property
    def matter(self) -> bool:
        """Whether frequencies depend on the length."""
        return self.grow or bool(self._long)

    @property
    def grow(self) -> bool:
        """Whether they are made for sequences longer than the config says."""
        return self._dynamic is not None

    def last(self, length: int) -> int:
        """The largest length with the frequencies of `length`."""
        ends = [end for end in (*self._long, self._dynamic) if end is not None and end >= length]
        return min(ends) if ends else length if self.grow else MAX_LENGTH

    def shortest(self, length: int) -> int:
        """The smallest length with the frequencies of `length`; 0 where the smallest of all has them."""
        if self.grow and length > (self._dynamic or 0):
            return length
        return max((end + 1 for end in (*self._long, self._dynamic) if end is not None and end < length), default=0)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model was made for; None if its config does not say, or its rotary embedding grows with them."""
    return None if RopeLengths(config).grow else getattr(config, "max_position_embeddings", None)


def packs_sequences(config: PreTrainedConfig) -> bool:
    """Whether several sequences can share one pass through the backbone; if not they run one after the other."""
    return config.model_type in PACKS and not RopeLengths(config).matter


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether some blocks of the family keep more than keys and values, or nothing."""
    return config.model_type in STATES


def why_no_prefix(config: PreTrainedConfig) -> str:
    """Why no keys and values of an adapter can stand before the first position, as a clause; empty: they can."""
    if keeps_states(config):
        return "keep states, before which no prefix can stand"
    if "indexed_attention" in (getattr(config, "layer_types", None) or ()):
        return "choose positions by keys of another kind, which a prefix lacks"
    return ""


def has_attention(config: PreTrainedConfig) -> bool:
    """Whether any block of the family attends to other positions."""
    try:
        return hasattr(config, "num_attention_heads")
    except RuntimeError:  # transformers' word for what differs from block to block
        return True


def score_heads(backbone: PreTrainedModel) -> int:
    """Heads of which the family's own attention has all scores in memory at once: 1 where torch computes them."""
    config = backbone.config
    indexed = "indexed_attention" in (getattr(config, "layer_types", None) or ())
    if not has_attention(config) or (getattr(backbone, "_supports_sdpa", False) and not indexed):
        return 1
    return max(config.num_attention_heads, getattr(config, "index_n_heads", 0))


def states_per_block(config: PreTrainedConfig) -> int:
    """Convolutions of a block that keeps states, each with a state of its own."""
    return getattr(config, "number_of_conv_states", 1)


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Per block its sliding window in positions, or None; empty if the config does not tell blocks apart."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_values(values: Mapping[str, Any], file: object) -> None:
    """Refuses what no config of a model says, before transformers does what it says.

    That is lists as long as there are layers, experts or labels, attention or experts that run code of a hub
    repository, and a base of rotary embeddings that turns nothing.

    Raises:
        UnsupportedModel: names the value.
    """
    for part in _with_inner(values):
        for key, value in part.items():
            counts = str(key).endswith(("layer", "layers", "experts")) and "per_layer" not in str(key)
            most = MAX_LAYERS if counts else MAX_LABELS if key == "num_labels" else None
            if key in _BASES and isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise UnsupportedModel(
                    f"{file} says {key}: {value}, which turns nothing: mend it, or download it again"
                )
            many = most is not None and isinstance(value, int) and value > most
            foreign = str(key).endswith("_implementation") and "/" in str(value)
            if many or foreign:
                raise UnsupportedModel(
                    f"{file} says {key}: {value}, and "
                    + (f"at most {most} are taken" if many else "no code of others is run")
                    + ": mend it, or download it again"
                )


def _with_inner(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield values
    for value in values.values():
        if isinstance(value, Mapping):
            yield from _with_inner(cast("Mapping[str, Any]", value))


def _kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: blocks of several kinds may have one each."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [kind for kind in kinds if "rope_type" in kind]


def _reason_against(config: PreTrainedConfig) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if hasattr(config, "type_vocab_size"):
        return "it is a bidirectional encoder"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its positions see those behind them"
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        return "its config does not say how many blocks it has"
    if keeps_states(config):
        # Its positions are run again after a rewind, with the frequencies of another length.
        return "its rotary embedding depends on the length of a text" if RopeLengths(config).matter else ""
    if not has_attention(config):
        return "its blocks keep a recurrent state instead of a KV cache"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "its blocks take an input of their own for every token besides the hidden state"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its blocks share KV caches with each other"
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        return "some of its blocks attend to the positions that the block before has chosen"
    known = _ATTENTION_TYPES | _OTHER_ATTENTION.get(config.model_type, set())
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if others:
        return f"it has blocks of the kind {others[0]!r}, whose states are not known here"
    return ""
