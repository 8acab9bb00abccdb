"""A family's transformers backbone, cut: with some of its blocks and nothing else, or with all but its blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from splitnet.errors import UnsupportedModel
from splitnet.model.attention import PACKED
from splitnet.model.families import family_of

_OWN_ROPE_PER_SEQUENCE = {"dynamic", "longrope"}
"""Kinds of rotary embedding whose frequencies depend on the length of the sequence: not shared by a pack."""


class CutBackbone:
    """How to build blocks `[start, end)` of a model.

    Attributes:
        container: name of the list of blocks within the backbone, such as `layers`.
        windows: per block of the span its sliding window in positions or None; empty if the config has no such list.
        packs: whether sequences can share one pass (the family's attention can be replaced); else row by row.
    """

    def __init__(self, config: PreTrainedConfig, start: int, end: int) -> None:
        self._family = family_of(config)
        config = copy.deepcopy(config)
        for key, value in self._family.neutral_config.items():
            setattr(config, key, value)
        self._config = config
        self._start, self._end = start, end
        self._class = backbone_class(config)
        types = getattr(config, "layer_types", None) or ()
        window = getattr(config, "sliding_window", None)
        self.windows = tuple(window if kind == "sliding_attention" else None for kind in types[start:end])
        self.packs = bool(self._class._supports_attention_backend) and not (
            _rope_types(config) & _OWN_ROPE_PER_SEQUENCE
        )
        self.container = ""

        cut = self

        def build(model: PreTrainedModel, config: PreTrainedConfig) -> None:
            cut._class.__init__(model, config)
            cut._cut(model)

        self._cut_class = type(
            self._class.__name__, (self._class,), {"__init__": build, "__module__": self._class.__module__}
        )
