"""How tokens are chosen where a request does not say: as OpenAI's API does, or as the checkpoint recommends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

_NO_SAMPLING = {
    "do_sample",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "transformers_version",
}


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that leaves these out is answered with. Unchanged, they are those of OpenAI's API.

    Attributes:
        top_k: how many of the likeliest tokens may be chosen; 0: all.
        min_p: which share of the likeliest token's probability a token must have; 0: none.
        repetition_penalty: by which the logits of tokens in prompt and answer are divided; 1: none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def choose_defaults(config: GenerationConfig, *, of_checkpoint: bool) -> tuple[SamplingDefaults, list[str]]:
    """The defaults, and what is to be said of them at the start: sentences that name each field of the checkpoint.

    Args:
        config: of the checkpoint.
        of_checkpoint: take what it recommends.
    """
    given = {name: value for name, value in config.to_diff_dict().items() if _is_of_sampling(name)}
    known = {name: given.pop(name) for name in asdict(SamplingDefaults()) if given.get(name) is not None}
    said: list[str] = []
    if of_checkpoint:
        defaults = SamplingDefaults(**known)
        said.append(f"requests that do not say otherwise get the checkpoint's {_named(known) or 'own defaults: none'}")
    else:
        defaults = SamplingDefaults()
        if known:
            said.append(f"the checkpoint's {_named(known)} is not used: --sampling-defaults checkpoint uses it")
    if given:
        said.append(f"the checkpoint's {_named(given)} is not used")
    return defaults, said


def _is_of_sampling(name: str) -> bool:
    return not name.startswith(("_", "output_")) and not name.endswith("_token_id") and name not in _NO_SAMPLING


def _named(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
