"""Converts the metadata of a GGUF file to a config of transformers. Facts about single families are in
`architectures.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.errors import UnsupportedModel

_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""All models whose frequencies are scaled in this way have these values and `_LLAMA_3_POSITIONS`, the positions of
their first training."""
_LLAMA_3_POSITIONS = 8192
_REDUNDANT_KEYS = {
    *("vocab_size", "block_count", "nextn_predict_layers", "rope.scaling.finetuned", "attention.value_length"),
    *("attention.recurrent_layers", "full_attention_interval", "tensor_data_layout", "rope.freq_base_swa"),
}
"""Keys that are read elsewhere, or that repeat the names and shapes of the tensors."""


class Metadata:
    """The metadata of a file's architecture. `used`: keys that were read, or are known to have no effect."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._values = file.of_architecture
        self.used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key without the name of the architecture."""
        self.used.add(key)
        return self._values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise UnsupportedModel(
                f"{self.file.name} lacks the key {self.file.architecture}.{key}: convert the model again with a "
                "current version of llama.cpp"
            )
        return self.get(key)

    def check_all_used(self) -> None:
        """Raises UnsupportedModel if there is a key that was not used."""
        left = sorted(self._values.keys() - self.used - _REDUNDANT_KEYS)
        if left:
            raise UnsupportedModel(
                f"{self.file.name} has {self.file.architecture}.{left[0]}, whose meaning splitnet does not know: take "
                "another file of this model, or its safetensors"
            )


def make_config(model_type: str, values: Mapping[str, Any], file: GgufFile) -> PreTrainedConfig:
    """A config of a family: `values`, and the values that all files give in the same way."""

    def token(name: str) -> int | None:
        return file.metadata.get(f"tokenizer.ggml.{name}_token_id")

    ends = sorted({one for one in (token("eos"), token("eot"), token("eom")) if one is not None})
    common: dict[str, Any] = {
        "bos_token_id": token("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": token("padding"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": dtype_of(file),
    }
    return CONFIG_MAPPING[model_type](**(common | dict(values)))


def dtype_of(file: GgufFile) -> torch.dtype:
    """The type of the matrices if all are stored as numbers; float32 if any are codes. Small matrices, such as routers
    of experts, are float32 in 16-bit files, too."""
    numbers: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + math.prod(tensor.shape)
    most = max(numbers, key=lambda dtype: numbers[dtype])
    return most if len(numbers) == 2 and not any(tensor.layout for tensor in file.tensors.values()) else torch.float32


def rope_parameters(metadata: Metadata, *, head_dim: int, partial: bool = False) -> dict[str, Any]:
    """The rotary embedding of a family with the same rotary embedding in all blocks. `partial`: whether the family may
    rotate only the first numbers of a head. Raises UnsupportedModel: its kind is unknown."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 10_000.0)}
    turned = metadata.get("rope.dimension_count", head_dim)
    if partial:
        parameters["partial_rotary_factor"] = turned / head_dim
    elif turned != head_dim:
        raise _odd(metadata, f"rotates {turned} of the {head_dim} numbers of a head, unlike its family")
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "linear":
        parameters |= {"rope_type": "linear", "factor": metadata["rope.scaling.factor"]}
    elif kind == "yarn":
        parameters |= _yarn(metadata)
    elif kind not in ("none", "longrope"):
        raise _odd(metadata, f"scales its rotary embedding in an unknown way ({kind})")
    metadata.used |= {"rope.scaling.factor", "rope.scaling.original_context_length"}
    tensors = metadata.file.tensors
    if kind in ("linear", "yarn") and ROPE_TENSORS & tensors.keys():
        raise _odd(metadata, f"scales its rotary embedding twice ({kind}, and by {min(ROPE_TENSORS & tensors.keys())})")
    if "rope_freqs.weight" in tensors:
        parameters |= _scaled_frequencies(tensors["rope_freqs.weight"].tensor(), parameters["rope_theta"], turned)
    if "rope_factors_long.weight" in tensors:
        factors = {f"{name}_factor": tensors[f"rope_factors_{name}.weight"].tensor().tolist() for name in _LONG_SHORT}
        parameters |= {"rope_type": "longrope", **factors}
        if "rope.scaling.attn_factor" in metadata:
            parameters["attention_factor"] = metadata["rope.scaling.attn_factor"]
    if "rope.scaling.original_context_length" in metadata:
        parameters["original_max_position_embeddings"] = metadata["rope.scaling.original_context_length"]
    return parameters


_LONG_SHORT = ("long", "short")
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are part of the config."""


def _yarn(metadata: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": metadata["rope.scaling.factor"]}
    found["original_max_position_embeddings"] = metadata["rope.scaling.original_context_length"]
    names = ("attn_factor", "attention_factor"), ("yarn_attn_factor", "attention_factor")
    for key, name in (*names, ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in metadata:
            found[name] = metadata[f"rope.scaling.{key}"]
    if metadata.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise _odd(metadata, "has an extrapolation factor for its rotary embedding, which splitnet does not know")
    return found


def _scaled_frequencies(factors: torch.Tensor, theta: float, turned: int) -> dict[str, Any]:
    """Config values that give frequencies divided by `factors`."""
    if bool((factors == 1).all()):
        return {}
    if turned != 2 * len(factors):
        raise ValueError(f"{turned} rotated numbers of a head do not fit {len(factors)} frequencies")
    frequencies = 1 / theta ** (torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    factor = float(factors.max())
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    smooth = ((_LLAMA_3_POSITIONS * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if torch.allclose(factors.double(), expected, rtol=1e-4):
        return _LLAMA_3 | {"factor": factor, "original_max_position_embeddings": _LLAMA_3_POSITIONS}
    both = dict.fromkeys(("long_factor", "short_factor"), factors.tolist())
    return {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": 1, **both}


def _odd(metadata: Metadata, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{metadata.file.name} {what}: take another file of this model, or its safetensors")


_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (r"\p{N}", _GPT_2)
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("glm4", "glm5", "chatglm-bpe"), (GGUF_PRE_TOKENIZER_SPLITS["llama3"],)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_3),
    "stablelm2": (GGUF_PRE_TOKENIZER_SPLITS["qwen2"],),
}
"""Splits that transformers lacks: `tokenizer.ggml.pre` -> expressions that split text, applied in order."""


def read_tokenizer(path: Path, model: str | None, split: str | None, **options: Any) -> Any:
    """The tokenizer of a file. `model`, `split`: `tokenizer.ggml.model` and `tokenizer.ggml.pre`. `options`: options of
    transformers' `from_pretrained`. Raises ValueError, with the reason: the tokenizer is unknown."""
    if model == "gpt2" and split not in SPLITS and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ValueError(f"it splits text as {split!r}, which is not known")
    options = {"trust_remote_code": False} | options
    made: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, **options)
    if model == "gpt2" and split in SPLITS:
        steps = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in SPLITS[split]]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_only])
    return made
