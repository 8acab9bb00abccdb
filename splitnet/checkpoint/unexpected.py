"""Tensors of a checkpoint that no part of its model takes: they are named, never dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from splitnet.errors import UnsupportedModel

SHOWN = 3
"""Tensors that an error names."""

_NOT_WEIGHTS = r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)position_ids$"
"""Tables that older checkpoints hold and models make anew; where one of these is a weight, the model takes it."""
_NEXT_TOKENS = r"(^|\.)mtp(\.|_|\d|$)"
"""Layers that predict more than one token, which transformers' classes do not have."""


def ignored(names: Iterable[str], model_class: Any) -> set[str]:
    """Those that models leave out on purpose: what the family's class says, old tables, further predictions."""
    own = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = re.compile("|".join(f"({pattern})" for pattern in (*own, _NOT_WEIGHTS, _NEXT_TOKENS)))
    return {name for name in names if known.search(name)}


def check_none(names: Iterable[str], model_type: str) -> None:
    """Refuses a checkpoint with tensors too many.

    Args:
        names: of tensors that nothing takes.

    Raises:
        UnsupportedModel: with the first of them and how many they are.
    """
    left = sorted(names)
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise UnsupportedModel(
            f"the checkpoint holds tensors that models of the family {model_type!r} do not take "
            f"({', '.join(left[:SHOWN])}{more}): without them the model would be another one; take a checkpoint in "
            "transformers' format, or remove them if they are not meant to be used"
        )
