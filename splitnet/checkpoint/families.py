"""The model families that can be cut into spans, with the special facts about some of them, and facts from configs.

A family is transformers' `model_type` of the text model. A family without an entry here is tried if it is a
decoder-only causal language model: it runs sequence by sequence with its own attention. Its blocks must be in one list
and keep only keys and values in the cache, and the rest of the backbone must allow neutral replacements. The load of a
span checks this, so a family with further requirements is refused, not run wrongly.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from splitnet.checkpoint.rope_lengths import RopeLengths
from splitnet.errors import UnsupportedModel

MAX_LAYERS = 4096  # messages and records can number no more
MAX_LABELS = 1 << 13  # transformers creates a name for each label
_BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base", "swa_rope_theta")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The special facts about a family. The tests of each family cover its facts.

    Attributes:
        packs: the packed attention of `splitnet.blocks.attention` can replace the family's own, so that sequences share
            a pass.
        states: some blocks keep states besides keys and values, or keep nothing. From a given state, the family's code
            computes the same for many positions at once as one by one.
        one_by_one: as `states`, but the family's code drops the state before a step of several positions, so all
            positions after the first step run one by one.
        native_step: `splitnet.blocks.fast.describe` supports everything in the family's blocks, so compiled steps run
            them.
        torch_step: short steps need not run the family's own code, because its blocks compute the same as Llama's at
            every position. Equal names of parts do not prove this: SmolLM3 omits the rotary embedding in some blocks,
            and Ministral 3 scales queries far from the beginning, which a short trial does not show.
        one_window: a sliding window in the config applies to all blocks; other families' configs list the blocks with a
            window.
        mlx: mlx-lm only renames the family's experts (`sanitize` in `mlx_lm/models`). In other families mlx-lm changes
            values: it adds one to norms, and reorders kernels and experts.
        same_as: transformers' name of a family that has another name in published configs.
        text_as: for a text model that transformers has only in multimodal models, the family whose blocks compute the
            same; `text_values` are values for the config of this family.
        heads_share_hidden: the size of a head is the size of hidden states divided by the number of heads, even if the
            config says otherwise.
        attention: a kind of blocks with special attention, whose positions are all kept.
        refused: why the family cannot be cut, where the config does not show it.
    """

    packs: bool = False
    states: bool = False
    one_by_one: bool = False
    native_step: bool = False
    torch_step: bool = False
    one_window: bool = False
    mlx: bool = False
    same_as: str = ""
    text_as: str = ""
    text_values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    heads_share_hidden: bool = False
    attention: str = ""
    refused: str = ""


def _alike(names: str, family: Family) -> dict[str, Family]:
    return dict.fromkeys(names.split(), family)


FAMILIES: Mapping[str, Family] = {
    **_alike(
        "apertus cohere cohere2 exaone4 gemma gemma2 gemma3_text glm4 granite helium hunyuan_v1_dense internlm3 "
        "nemotron olmo olmo2 olmo3 phi smollm3 stablelm",
        Family(packs=True, native_step=True, mlx=True),
    ),
    **_alike(
        "arcee codegen cwm deepseek_v3 ernie4_5 glm gpt2 gpt_bigcode gpt_neox gptj granitemoe ministral opt persimmon",
        Family(packs=True, native_step=True),
    ),
    **_alike(
        "glm4_moe llama minimax_m2 qwen2 qwen2_moe qwen3 seed_oss solar_open",
        Family(packs=True, torch_step=True, native_step=True, mlx=True),
    ),
    **_alike(
        "mistral mixtral olmoe qwen3_moe",
        Family(packs=True, torch_step=True, native_step=True, one_window=True, mlx=True),
    ),
    **_alike("ernie4_5_moe gpt_oss", Family(packs=True, torch_step=True, native_step=True)),
    **_alike("phi3 starcoder2", Family(packs=True, native_step=True, one_window=True, mlx=True)),
    "ministral3": Family(packs=True, mlx=True),
    **_alike("gemma4_text gemma4_unified_text", Family(packs=True)),
    **_alike("bloom deepseek_v2 falcon glm4_moe_lite mpt youtu", Family(native_step=True)),
    **_alike(
        "bamba falcon_h1 granitemoehybrid kimi_linear lfm2 lfm2_moe mamba2 nemotron_h olmo_hybrid qwen3_5_moe_text "
        "qwen3_5_text qwen3_next",
        Family(states=True),
    ),
    **_alike("falcon_mamba jamba mamba", Family(states=True, one_by_one=True)),
    **_alike("deepseek_v32 glm_moe_dsa", Family(attention="indexed_attention")),
    "llama4_text": Family(attention="chunked_attention"),
    "deepseek_v4": Family(
        refused="between its blocks there are several hidden states, and some blocks choose experts by the token"
    ),
    "gemma3n_text": Family(refused="its blocks share states with each other besides the hidden state"),
    "glm4v_moe_text": Family(text_as="glm4_moe", text_values={"use_qk_norm": False}),
    "glm4v_text": Family(text_as="glm4", text_values={"attention_bias": True}, heads_share_hidden=True),
    "glm_ocr_text": Family(text_as="glm4", text_values={"attention_bias": False}),
    "granite4_vision_text": Family(text_as="granite"),
    "hunyuan_vl_text": Family(text_as="hunyuan_v1_dense"),
    "kimi_k2": Family(same_as="deepseek_v3"),
    "mimo": Family(same_as="qwen2"),
    "paddleocr_vl_text": Family(text_as="llama"),
    **_alike("qwen2_5_vl_text qwen2_vl_text", Family(text_as="qwen2", heads_share_hidden=True)),
    "qwen3_vl_moe_text": Family(text_as="qwen3_vl_moe_alone", text_values={"norm_topk_prob": True}),
    "qwen3_vl_text": Family(text_as="qwen3"),
    **_alike("zamba zamba2", Family(refused="some of its blocks have the same weights")),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The special facts about the family of a text model."""
    return FAMILIES.get(config.model_type, Family())


ADDED_POSITIONS = ("wpe", "embed_positions")
"""Modules outside the blocks whose output the backbone adds to the embeddings. The client adds this output; in spans
these modules return zero."""

NEUTRAL_CONFIG: Mapping[str, Any] = {"embedding_multiplier": 1.0}
"""Config values with which a backbone passes its input to the first block unchanged."""

UNCALLED_LAYERS = frozenset({"dt_proj"})
"""Linear layers that are never called, because the family's code multiplies by the weight itself. An adapter that adds
to the output of such a layer would have no effect."""

PER_LAYER_INPUT = "per_layer_input"
"""The second argument of blocks that have an input of their own for every token."""

ALL_POSITIONS = "first_kv_shared_layer_idx"
NEUTRAL_ATTRIBUTES: Mapping[str, Any] = {ALL_POSITIONS: -1, "hidden_size_per_layer_input": 0}
"""Attributes of a backbone with which it computes no inputs of blocks, and gives each block all positions."""

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model within the config of a checkpoint. If transformers has no class for the text model
    alone, this is the config of a family whose blocks compute the same."""
    text = config.get_text_config()
    make_known(text)
    family = family_of(text)
    if not family.text_as:
        return text
    values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    # Without images, the three positions of every token are equal, so the family's rotary embedding gives the same.
    rope = {key: value for key, value in (text.rope_parameters or {}).items() if key[:5] not in ("mrope", "type")}
    rope = {"partial_rotary_factor": 1.0, "rope_type": "default"} | rope
    values["rope_parameters"] = dict(rope)
    values |= family.text_values
    if family.heads_share_hidden:
        values["head_dim"] = text.hidden_size // text.num_attention_heads
    found = CONFIG_MAPPING[family.text_as](**values)
    found.rope_parameters |= rope  # some classes replace `partial_rotary_factor` by a default of their own
    return found


def rope_with_axes(whole: PreTrainedConfig, backbone: Any) -> nn.Module | None:
    """The rotary embedding of a multimodal model whose text model `text_config_of` replaces with `backbone`: it takes
    positions with several axes, and gives the same as that of `backbone` where the axes are equal. None: the text model
    is not replaced. Raises UnsupportedModel: it gives something else."""
    text = whole.get_text_config()
    if not family_of(text).text_as:
        return None
    with torch.device("meta"):
        if type(text) in AutoModel._model_mapping:
            model = AutoModel.from_config(text)
        else:
            model = image_text_class(whole)(copy.deepcopy(whole)).get_decoder()
        ropes = (module for module in model.modules() if hasattr(module, "rope_type") and hasattr(module, "inv_freq"))
        found = type(next(ropes))
    states, positions = torch.zeros(1, 3, text.hidden_size), torch.arange(5, 8)[None]
    expected = backbone.rotary_emb(states, positions)
    for kind in (found, type(found.__name__, (_InHalves, found), {})):
        rope = kind(config=text)
        if all(map(torch.allclose, rope(states, positions), expected)):
            return rope
    raise UnsupportedModel(f"the rotary embedding of the family {text.model_type!r} is not that of its blocks")


class _InHalves(nn.Module):
    """A rotary embedding that gives its values in two equal halves, for blocks that repeat the first half in their own
    order. Without this class, it gives each value twice in a row."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = super().forward(x, position_ids)  # pyright: ignore
        return tuple(torch.cat((each[..., ::2], each[..., ::2]), dim=-1) for each in found)


def make_known(config: PreTrainedConfig) -> None:
    """Registers text models that transformers hides in multimodal ones. Call it before transformers' auto classes are
    used."""
    if config.model_type in ("mistral4", "step3p5", "qwen3_vl_moe_text"):
        _make_text_models_known()


@cache
def _make_text_models_known() -> None:
    """Registers causal language models that transformers has only inside multimodal ones, with the names and layouts in
    their checkpoints and their conversions."""
    # Imported here because these modules import slowly and are rarely needed.
    from torch import nn
    from transformers import (
        GenerationMixin,
        Mistral4Config,
        Mistral4ForCausalLM,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        Qwen3MoeModel,
    )
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

    class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
        """Step-3.5, which was published as a text model."""

        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as in transformers)
        config_class = Step3p7TextConfig

        def __init__(self, config: Step3p7TextConfig) -> None:
            super().__init__(config)  # pyright: ignore[reportArgumentType]
            self.model = Step3p7TextModel(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        forward: Any = Qwen3ForCausalLM.forward  # only calls the backbone and the head

    class Qwen3VLMoeAloneConfig(Qwen3MoeConfig):
        """The config of the text model of Qwen3-VL-MoE: a Qwen3-MoE whose files have another layout of experts."""

    class Qwen3VLMoeAloneModel(Qwen3MoeModel):
        """The backbone of the text model of Qwen3-VL-MoE."""

        __module__ = Qwen3MoeModel.__module__  # the module in which transformers looks up what the family supports
        config_class = Qwen3VLMoeAloneConfig

    class Qwen3VLMoeAloneForCausalLM(Qwen3MoeForCausalLM):
        """The text model of Qwen3-VL-MoE with its head."""

        __module__ = Qwen3MoeModel.__module__
        config_class = Qwen3VLMoeAloneConfig

    AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    AutoModel.register(Step3p7TextConfig, Step3p7TextModel, exist_ok=True)
    AutoModelForCausalLM.register(Step3p7TextConfig, Step3p5ForCausalLM, exist_ok=True)
    within_towers = get_checkpoint_conversion_mapping("step3p7") or []
    own = [step for step in within_towers if not any(source.startswith("^") for source in step.source_patterns)]
    register_checkpoint_conversion_mapping("step3p5", own, overwrite=True)
    CONFIG_MAPPING.register("qwen3_vl_moe_alone", Qwen3VLMoeAloneConfig, exist_ok=True)
    AutoModel.register(Qwen3VLMoeAloneConfig, Qwen3VLMoeAloneModel, exist_ok=True)
    AutoModelForCausalLM.register(Qwen3VLMoeAloneConfig, Qwen3VLMoeAloneForCausalLM, exist_ok=True)
    for alone in (Qwen3VLMoeAloneModel, Qwen3VLMoeAloneForCausalLM):
        steps = [
            step for name in ("qwen3_moe", "qwen3_vl_moe") for step in get_checkpoint_conversion_mapping(name) or []
        ]
        register_checkpoint_conversion_mapping(alone.__name__, steps, overwrite=True)


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model without a head. Raises UnsupportedModel: transformers has no causal language model of this
    family."""
    if type(config) not in AutoModelForCausalLM._model_mapping or type(config) not in AutoModel._model_mapping:
        raise UnsupportedModel(f"models of the family {config.model_type!r} are not causal language models")
    return cast(type[PreTrainedModel], AutoModel._model_mapping[type(config)])


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model with its head. Raises as `backbone_class`."""
    backbone_class(config)
    return cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[type(config)])


def reads_images(whole: PreTrainedConfig) -> bool:
    """Whether transformers has a class for images and texts of this family."""
    if type(whole) not in AutoModelForImageTextToText._model_mapping:
        return False
    found: Any = AutoModelForImageTextToText._model_mapping[type(whole)]  # some of these classes take only text
    return "pixel_values" in inspect.signature(found.forward).parameters


def image_text_class(whole: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a multimodal model that reads images and texts. Raises UnsupportedModel: transformers has none."""
    if not reads_images(whole):
        raise UnsupportedModel(
            f"models of the family {whole.model_type!r} read no images: use AutoModelForCausalLM for their text"
        )
    return cast(type[PreTrainedModel], AutoModelForImageTextToText._model_mapping[type(whole)])


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model with a head that classifies sequences. Raises as `backbone_class`."""
    backbone_class(config)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedModel(
            f"transformers has no sequence classification for models of the family {config.model_type!r}: take a model "
            "of another family, such as Llama, Qwen or Gemma"
        )
    return cast(type[PreTrainedModel], AutoModelForSequenceClassification._model_mapping[type(config)])


def check_can_be_cut(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModel, with the reason, if a text model cannot be cut into spans."""
    reason = family_of(config).refused or _reason_against(config)
    if reason:
        raise UnsupportedModel(
            f"models of the family {config.model_type!r} cannot be cut into spans: {reason}. Use a decoder-only model "
            "such as Llama, Qwen or Gemma"
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model was made for; None if its config does not say, or its rotary embedding adapts to any
    length."""
    return None if RopeLengths(config).frequencies_grow else getattr(config, "max_position_embeddings", None)


def packs_sequences(config: PreTrainedConfig) -> bool:
    """Whether several sequences can share one pass through the backbone; if not, they run one after the other."""
    return family_of(config).packs and not RopeLengths(config).frequencies_vary


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether some blocks of the family keep more than keys and values, or nothing."""
    return family_of(config).states


def per_layer_size(config: PreTrainedConfig) -> int:
    """Values per position of the input that each block has of its own; 0: blocks read only hidden states."""
    return getattr(config, "hidden_size_per_layer_input", None) or 0


def last_cut(config: PreTrainedConfig) -> int:
    """The last boundary at which the model can be cut: blocks behind it read keys and values of each other. Without
    such blocks, this is the number of blocks."""
    count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ()
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    return min((max((i for i in range(own) if kinds[i] == kind), default=0) for kind in kinds[own:]), default=count)


def can_cut(config: PreTrainedConfig, boundary: int) -> bool:
    """Whether a span can begin or end at a boundary."""
    return boundary <= last_cut(config) or boundary == config.num_hidden_layers


def check_cut(config: PreTrainedConfig, start: int, end: int) -> None:
    """Raises UnsupportedModel: blocks `[start, end)` read keys and values of others, or others read those of them."""
    last, count = last_cut(config), config.num_hidden_layers
    if not (can_cut(config, start) and can_cut(config, end)):
        raise UnsupportedModel(
            f"blocks {last}:{count} share keys and values, so they run together: use {last}:{count} or more, or blocks "
            f"up to {last}, in place of {start}:{end}"
        )


def why_no_prefix(config: PreTrainedConfig) -> str:
    """Why an adapter can have no keys and values before the first position, as a clause; empty: it can."""
    if keeps_states(config):
        return "keep states, which cannot have a prefix"
    if last_cut(config) < config.num_hidden_layers:
        return "read keys and values of other blocks, which cannot have a prefix"
    if "indexed_attention" in (getattr(config, "layer_types", None) or ()):
        return "choose positions by keys of another kind, which a prefix lacks"
    return ""


def has_attention(config: PreTrainedConfig) -> bool:
    """Whether any block of the family attends to other positions."""
    try:
        return hasattr(config, "num_attention_heads")
    except RuntimeError:  # transformers raises this for attributes that differ between blocks
        return True


def score_heads(backbone: PreTrainedModel) -> int:
    """Heads whose scores the family's own attention has in memory at once; 1 where torch computes the attention."""
    config = backbone.config
    indexed = "indexed_attention" in (getattr(config, "layer_types", None) or ())
    if not has_attention(config) or (getattr(backbone, "_supports_sdpa", False) and not indexed):
        return 1
    return max(config.num_attention_heads, getattr(config, "index_n_heads", 0))


def states_per_block(config: PreTrainedConfig) -> int:
    """Convolutions of a block that keeps states; each convolution has a state."""
    return getattr(config, "number_of_conv_states", 1)


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The sliding window of each block in positions, or None; empty if the config does not distinguish blocks."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_values(values: Mapping[str, Any], file: object) -> None:
    """Raises UnsupportedModel for a value that no real config has, before transformers uses it.

    Such values make lists as long as the number of layers, experts or labels, choose attention or experts that run code
    of a hub repository, or are a base of rotary embeddings that rotates nothing.
    """
    for part in _with_inner(values):
        for key, value in part.items():
            counts = str(key).endswith(("layer", "layers", "experts", "depth")) and "per_layer" not in str(key)
            most = MAX_LAYERS if counts else MAX_LABELS if key == "num_labels" else None
            if key in _BASES and isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise UnsupportedModel(
                    f"{file} says {key}: {value}, which cannot be the base of a rotary embedding: correct it, or "
                    "download it again"
                )
            many = most is not None and isinstance(value, int) and value > most
            foreign = str(key).endswith("_implementation") and "/" in str(value)
            if many or foreign:
                raise UnsupportedModel(
                    f"{file} says {key}: {value}, and "
                    + (f"at most {most} are taken" if many else "code of hub repositories is not run")
                    + ": correct it, or download it again"
                )


def _with_inner(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield values
    for value in values.values():
        if isinstance(value, Mapping):
            yield from _with_inner(cast("Mapping[str, Any]", value))


def _reason_against(config: PreTrainedConfig) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if hasattr(config, "type_vocab_size"):
        return "it is a bidirectional encoder"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its positions attend to later positions"
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        return "its config does not say how many blocks it has"
    if keeps_states(config):
        # After a rewind its positions run again, with the frequencies of another length.
        return "its rotary embedding depends on the length of a text" if RopeLengths(config).frequencies_vary else ""
    if per_layer_size(config) and not packs_sequences(config):
        return "its blocks have a second input for every token besides the hidden state"
    if getattr(config, "num_kv_shared_layers", 0) and not packs_sequences(config):
        return "its blocks share KV caches with each other"
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        return "some of its blocks attend to the positions that the block before has chosen"
    return unknown_states(config)


def unknown_states(config: PreTrainedConfig) -> str:
    """Why rows cannot hold the states of a family's blocks; empty if they can."""
    if keeps_states(config):
        return ""
    if not has_attention(config):
        return "its blocks keep a recurrent state instead of a KV cache"
    known = _ATTENTION_TYPES | {family_of(config).attention}
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    return f"it has blocks of the kind {others[0]!r}, whose states are not known here" if others else ""
