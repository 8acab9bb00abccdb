"""The parameters of `generate()` and `forward()`: each is honoured, or refused with a sentence that names it.

The tables are complete: other parameters are refused. `docs/parameters.md` shows the tables, and a test compares them
with all parameters of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import ContextTooLong, UnsupportedParameter

HONOURED = "as in transformers"


@dataclass(frozen=True, slots=True)
class RefusedParameter:
    """A refused parameter. why: the reason, and what to do. unless: values without effect, besides None."""

    why: str
    unless: tuple[str | bool, ...] = (False,)


_CACHE = RefusedParameter("keys and values are on the peers, which choose how to hold them: leave it out")
_INSIDE = RefusedParameter("is computed inside the blocks, and peers send only the output of the blocks: leave it out")
_HUB = RefusedParameter("is a way of generating that transformers has moved out of its package: leave it out")
_LAYERS = RefusedParameter(
    "makes drafts with layers of the model that this process lacks: use speculate=, or prompt_lookup_num_tokens="
)
_PACKED = RefusedParameter("packs several sequences into one row: give each a row of its own")
_UNKNOWN = RefusedParameter("is a parameter that splitnet does not know: leave it out")


def _all(names: str, rule: str | RefusedParameter) -> dict[str, str | RefusedParameter]:
    return dict.fromkeys(names.split(), rule)


GENERATION: Mapping[str, str | RefusedParameter] = {
    **_all(
        """max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
        use_cache temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
        encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids renormalize_logits
        forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens sequence_bias token_healing guidance_scale watermarking_config num_return_sequences
        output_scores output_logits return_dict_in_generate pad_token_id bos_token_id eos_token_id
        encoder_no_repeat_ngram_size decoder_start_token_id is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
        assistant_lookbehind target_lookbehind assistant_ensemble_weight compile_config disable_compile
        prefill_chunk_size transformers_version""",
        HONOURED,
    ),
    "cache_implementation": RefusedParameter(_CACHE.why, unless=("dynamic", "hybrid")),
    **_all("cache_config max_cache_len continuous_batching_config", _CACHE),
    **_all("output_attentions output_hidden_states", _INSIDE),
    **_all("use_mtp speculation_type assistant_early_exit", _LAYERS),
    **_all("low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids", _HUB),
}
"""The parameters of `GenerationConfig`."""

FORWARD: Mapping[str, str | RefusedParameter] = {
    **_all("input_ids inputs_embeds labels use_cache num_items_in_batch return_dict token_type_ids", HONOURED),
    "logits_to_keep": "as in transformers; with `labels` too, and then the loss covers all positions, part after part",
    "attention_mask": "`[batch, positions]`, without a hole between tokens; with a cache, padding is on the left",
    "position_ids": "the positions that follow from the mask; others are refused",
    "cache": "a cache of `new_cache()`, or of an earlier call; others are refused",
    **_all("output_attentions output_hidden_states output_router_logits", _INSIDE),
    **_all("cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx", _PACKED),
    "is_causal": RefusedParameter("changes the attention inside the blocks: leave it out", unless=(True,)),
    **_all(
        "encoder_hidden_states encoder_attention_mask",
        RefusedParameter("is attended to inside the blocks: leave it out"),
    ),
}
"""The parameters of the `forward` of causal models."""

_DEFAULTS = GenerationConfig._get_default_generation_params()
_REFUSED = {
    name: rule
    for name in vars(GenerationConfig()).keys() - {"_from_model_config"}
    if isinstance(rule := GENERATION.get(name, _UNKNOWN), RefusedParameter)
}
_LEFT_BY_GENERATE = frozenset({"tokenizer", "assistant_tokenizer"})  # used by `generate()`, and passed on nevertheless
_EMBEDDED = frozenset({"token_type_ids"})  # backbones with this name in their signature embed it before the blocks


class GenerateCall:
    """The parameters of a call of `generate()`.

    config: the config of the model, for parameters that neither the arguments nor a config among them set.
    """

    def __init__(self, given: Mapping[str, Any], config: GenerationConfig) -> None:
        self._given = given
        self._configs = [each for each in (given.get("generation_config"), config) if each is not None]

    def value(self, name: str) -> Any:
        """The value of a parameter of `GenerationConfig`."""
        if name in self._given:
            return self._given[name]
        return next((value for one in self._configs if (value := getattr(one, name, None)) is not None), None)

    def check_parameters(self) -> None:
        """Raises UnsupportedParameter: remote blocks cannot honour a parameter."""
        for name, rule in _REFUSED.items():
            value = self.value(name)
            if value != _DEFAULTS.get(name):
                _check(name, rule, value)


def check_forward(given: Mapping[str, Any], config: Any, explicit: Iterable[str]) -> None:
    """Raises UnsupportedParameter: remote blocks cannot honour an argument of a call of a backbone.

    config: the config of the model, with defaults of some parameters. explicit: names in the signature of the backbone.
    """
    for name, value in given.items():
        if value is None or name in _LEFT_BY_GENERATE:
            continue
        rule = _UNKNOWN if name in _EMBEDDED and name not in explicit else FORWARD.get(name, _UNKNOWN)
        if isinstance(rule, RefusedParameter):
            _check(name, rule, value)
    for name in ("output_attentions", "output_hidden_states"):
        if name not in given:
            _check(name, _INSIDE, getattr(config, name, None))


def refuse(name: str, why: str) -> UnsupportedParameter:
    """The error of a parameter that cannot be honoured. why: the reason, then what the user can do."""
    return UnsupportedParameter(f"{name} {why}")


def too_long(positions: int, most: int) -> ContextTooLong:
    """The error of a sequence that is longer than the model's context."""
    return ContextTooLong(
        f"{positions} positions are more than the model's context of {most}: "
        "shorten the prompt or lower --max-new-tokens"
    )


def mask_of(given: Any, batch: int, columns: int) -> torch.Tensor:
    """The mask `[batch, columns]` bool, on the CPU; False is padding. Raises UnsupportedParameter: wrong shape."""
    if given is None:
        return torch.ones(batch, columns, dtype=torch.bool)
    if not isinstance(given, torch.Tensor) or given.shape != (batch, columns):
        shape = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise refuse("attention_mask", f"must be [batch, positions] = {[batch, columns]}, not {shape}")
    return given.to("cpu", torch.bool)


def check_positions(positions: Any, mask: torch.Tensor, past: int, prefix: int) -> None:
    """Checks that positions are the consecutive ones that peers count, without padding.

    positions: `[..., batch or 1, new]`; None: the positions of the mask. mask: `[batch, past + new]`. past: cached
    columns. prefix: positions before the first column.

    Raises UnsupportedParameter: other positions, a hole in the mask that the positions do not skip, or no new position.
    """
    if mask.shape[1] == past:
        raise refuse("input_ids", "have no token: give at least one")
    if positions is not None:
        if positions.shape[-1] != mask.shape[1] - past:
            raise refuse("position_ids", f"must be [batch, {mask.shape[1] - past}], not {list(positions.shape)}")
        given, counted = positions.to("cpu"), mask.sum(dim=1, keepdim=True) - 1 + prefix
        if mask.shape[1] - past > 1:
            counted = (mask.long().cumsum(dim=1) - 1 + prefix)[:, past:]
        if bool((given == counted).all()):  # the usual case: also equal at padding
            return
        padding = ~mask[:, past:]
        if bool(((given == counted) | padding).all()):
            return
        columns = torch.arange(past, mask.shape[1]) + prefix
        if not bool(((given == columns) | padding).all()):
            raise refuse("position_ids", "are counted by the peers, from the attention mask: leave them out")
    if past:  # the padding of cached columns is on the left
        return
    begins = mask[:, 1:] & ~mask[:, :-1]
    if bool((begins.sum(dim=1) + mask[:, 0] > 1).any()):
        raise refuse(
            "attention_mask",
            "has padding between tokens, which peers do not support: pad on the right, or give position_ids that skip "
            "the padding",
        )


def rope_length_of(positions: Any, columns: int, ropes: RopeLengths, least: int = 0) -> int:
    """The text length from which transformers computes rotary frequencies, for
    `splitnet.wire.messages.Step.rope_length`.

    positions: as in `check_positions`. columns: of the text after the call, with padding and prefix. least: least
    length of the text.
    """
    if not ropes.frequencies_vary:
        return 0
    return ropes.shortest(max(least, columns if positions is None else int(positions.max()) + 1))


def _check(name: str, rule: RefusedParameter, value: Any) -> None:
    if value is not None and not (isinstance(value, str | bool) and value in rule.unless):
        raise refuse(name, rule.why)
