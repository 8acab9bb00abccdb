"""The tokenizer that the metadata of a GGUF file describe: transformers makes it; here is how it splits text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

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
"""What transformers does not know: `tokenizer.ggml.pre` -> expressions by which text is split, one after the other."""


def read_tokenizer(path: Path, model: str | None, split: str | None, **options: Any) -> Any:
    """The tokenizer of a file.

    Args:
        model, split: `tokenizer.ggml.model` and `tokenizer.ggml.pre`.
        options: of transformers' `from_pretrained`.

    Raises:
        ValueError: it is not known; the message says what.
    """
    if model == "gpt2" and split not in SPLITS and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ValueError(f"it splits text as {split!r}, which is not known")
    options = {"trust_remote_code": False} | options
    made: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, **options)
    if model == "gpt2" and split in SPLITS:
        steps = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in SPLITS[split]]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_only])
    return made
