"""Prompts that PEFT has trained: embeddings before the input, or keys and values before the first position.

PEFT hands a prefix to the model as a cache that holds something already. Here keys and values live on the peers, so it
is taken out of the call and given to them as an adapter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import DynamicCache

from splitnet.client.local_adapters import Prefixes
from splitnet.client.parameters import refuse


def take_prefix(given: dict[str, Any], model: Any) -> Prefixes:
    """Takes the prefix that PEFT has handed over out of what `model` is called with; empty if there is none.

    Raises:
        UnsupportedParameter: it is no prefix, but a cache of somebody else's.
    """
    name = next((name for name in ("cache", "past_key_values") if isinstance(given.get(name), DynamicCache)), None)
    if name is None or not given[name].get_seq_length():
        return ()
    if not _called_by_peft(model):
        raise refuse(
            name,
            "is a DynamicCache, and the blocks are remote: leave it out, or use model.new_cache()",
        )
    prefix = prefix_in(given.pop(name))
    given["use_cache"] = False
    length = prefix[0][0].shape[1]
    mask = given.get("attention_mask")
    if mask is not None:
        given["attention_mask"] = mask[:, length:]
    if given.get("position_ids") is None:
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        given["position_ids"] = torch.arange(length, length + inputs.shape[1], device=inputs.device)[None]
    return prefix


def _called_by_peft(model: Any) -> bool:
    """Whether one of the calls under way is that of a PEFT model around `model`: what it hands over does not tell."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, PeftModel) and caller.get_base_model() is model:
            return True
        frame = frame.f_back
    return False


def prefix_in(cache: DynamicCache) -> Prefixes:
    """Keys and values in a cache, block by block; PEFT has the same ones for all rows, so those of the first."""
    layers: list[Any] = list(cache.layers)
    return tuple((layer.keys[0], layer.values[0]) for layer in layers)


def prompt_wrapper(model: Any) -> Any:
    """The PEFT model that generates with `model` and a prompt that was trained; None if there is none."""
    replaced = model.__dict__.get("prepare_inputs_for_generation")
    wrapper = getattr(replaced, "__self__", None)
    if wrapper is None or wrapper is model or not wrapper.active_peft_config.is_prompt_learning:
        return None
    return wrapper


def with_trained_prompt(wrapper: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Prefixes]:
    """What `generate()` is to be called with: the trained prompt is put before the user's, or returned as a prefix.

    PEFT's own way to do so changes the inputs of every step, by names of arguments that transformers has given up.
    """
    from peft import PeftType

    model = wrapper.base_model
    model.__dict__.pop("prepare_inputs_for_generation", None)
    given = dict(given)
    input_ids = given.pop("input_ids", None)
    if given.get("inputs") is not None:
        input_ids = given.pop("inputs")
    if input_ids is None or given.get("inputs_embeds") is not None:
        raise refuse("inputs_embeds", "do not go together with a trained prompt: give input_ids")
    given["input_ids"] = input_ids
    with torch.no_grad():
        if wrapper.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            return given, prefix_in(wrapper.get_prompt(1))
        prompt = wrapper.get_prompt(batch_size=input_ids.shape[0])
        embeddings = model.get_input_embeddings()(input_ids)
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.long)
    # The trained prompt comes first in the text, so behind the padding on the left.
    padding = [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
    given["inputs_embeds"] = _inserted(embeddings, prompt.to(embeddings.dtype), padding)
    given["attention_mask"] = _inserted(mask, mask.new_ones(prompt.shape[:2]), padding)
    return given, ()


def _inserted(rows: torch.Tensor, inserted: torch.Tensor, places: list[int]) -> torch.Tensor:
    """`[batch, seq, ...]`: each row with another inserted at its place."""
    pairs = zip(rows, inserted, places, strict=True)
    return torch.stack([torch.cat((row[:place], more, row[place:])) for row, more, place in pairs])
