"""Prompts that PEFT has trained: embeddings before the input, or keys and values before the first position.

PEFT hands a prefix to the model as a cache that holds something already. Here keys and values live on the peers, so it
is taken out of the call and given to them as an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from splitnet.client.local_adapters import Prefixes


def take_prefix(kwargs: dict[str, Any], input_ids: torch.Tensor | None) -> Prefixes:
    """Takes a prefix out of what a model is called with; empty if there is none."""
    name = next((name for name in ("cache", "past_key_values") if isinstance(kwargs.get(name), DynamicCache)), None)
    if name is None:
        return ()
    prefix = prefix_in(kwargs[name])
    if not prefix:
        return ()
    del kwargs[name]
    kwargs["use_cache"] = False
    length = prefix[0][0].shape[1]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = mask[:, length:]
    given = input_ids if input_ids is not None else kwargs.get("input_ids")
    if given is None:
        given = kwargs["inputs_embeds"]
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = torch.arange(length, length + given.shape[1], device=given.device)[None]
    return prefix


def prefix_in(cache: DynamicCache) -> Prefixes:
    """Keys and values in a cache, block by block; PEFT has the same ones for all rows, so those of the first."""
    layers: list[Any] = list(cache.layers)
    if not cache.get_seq_length():
        return ()
    return tuple((layer.keys[0], layer.values[0]) for layer in layers)


def prompt_wrapper(model: Any) -> Any:
    """The PEFT model that generates with `model` and a prompt that was trained; None if there is none."""
    replaced = model.__dict__.get("prepare_inputs_for_generation")
    wrapper = getattr(replaced, "__self__", None)
    if wrapper is None or wrapper is model or not wrapper.active_peft_config.is_prompt_learning:
        return None
    return wrapper


def with_trained_prompt(
    wrapper: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, dict[str, Any], Prefixes]:
    """What `generate()` is to be called with: the trained prompt is put before the user's, or returned as a prefix.

    PEFT's own way to do so changes the inputs of every step, by names of arguments that transformers has given up.
    """
    from peft import PeftType

    model = wrapper.base_model
    model.__dict__.pop("prepare_inputs_for_generation", None)
    kwargs = dict(kwargs)
    input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if input_ids is None:
        raise ValueError("to generate with a trained prompt, give input_ids")
    with torch.no_grad():
        if wrapper.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            return input_ids, kwargs, prefix_in(wrapper.get_prompt(1))
        prompt = wrapper.get_prompt(batch_size=input_ids.shape[0])
        embeddings = model.get_input_embeddings()(input_ids)
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.long)
    # The trained prompt comes first in the text, so behind the padding on the left.
    padding = [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
    kwargs["inputs_embeds"] = _inserted(embeddings, prompt.to(embeddings.dtype), padding)
    kwargs["attention_mask"] = _inserted(mask, mask.new_ones(prompt.shape[:2]), padding)
    return input_ids, kwargs, ()


def _inserted(rows: torch.Tensor, inserted: torch.Tensor, places: list[int]) -> torch.Tensor:
    """`[batch, seq, ...]`: each row with another inserted at its place."""
    pairs = zip(rows, inserted, places, strict=True)
    return torch.stack([torch.cat((row[:place], more, row[place:])) for row, more, place in pairs])
