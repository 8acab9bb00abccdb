"""What a multimodal model hands to its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from splitnet.blocks.stand_ins import HANDED, BlockStandIn, GroupMask, HandedStates
from splitnet.errors import UnsupportedModel


def mask(ids: list[list[int]], padding: torch.Tensor | None = None) -> torch.Tensor:
    config = LlamaConfig()
    config._attn_implementation_internal = HANDED
    hidden = torch.zeros(len(ids), len(ids[0]), 4)
    found = create_causal_mask(config, hidden, padding, None, block_sequence_ids=torch.tensor(ids))
    assert isinstance(found, GroupMask)
    return found.as_subclass(torch.Tensor)


def test_groups_are_found_in_the_mask_that_the_model_makes() -> None:
    found = mask([[-1, 0, 0, 0, 1, 1, -1], [-1, -1, -1, -1, -1, -1, -1]])
    assert found.tolist() == [[0, 2, 2, 2, 3, 3, 0], [0] * 7]


def test_padding_is_found_in_the_mask() -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.bool)
    assert mask([[-1, -1, 0, 0, -1]], padding).tolist() == [[-1, -1, 3, 3, 0]]


def test_long_masks_are_read_in_pieces() -> None:
    found = mask([[-1] * 300 + [0] * 300 + [-1] * 100])
    assert bool((found[0, :300] == 0).all()) and bool((found[0, 300:600] == found[0, 300]).all()) and found[0, 300] > 0


@pytest.mark.parametrize("ids", [[[0, -1, 0]], [[0, 1, 0, 1]]])
def test_groups_that_are_not_of_neighbours_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(UnsupportedModel):
        mask(ids)


def stand_ins(count: int) -> tuple[list[BlockStandIn], HandedStates]:
    handed = HandedStates(count)
    return [BlockStandIn(nn.Identity(), False, handed, index, "full_attention") for index in range(count)], handed


def test_states_that_the_model_adds_between_blocks_are_found() -> None:
    blocks, handed = stand_ins(3)
    first, added = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    hidden = blocks[0](first)
    hidden = blocks[1](hidden + added)
    assert torch.equal(blocks[2](hidden), first)
    assert handed.added.keys() == {1} and torch.equal(handed.added[1], added)
    blocks[0](first)
    assert not handed.added


def test_tensors_that_peers_do_not_read_are_refused() -> None:
    blocks, _ = stand_ins(1)
    with pytest.raises(UnsupportedModel, match="per_layer_input"):
        blocks[0](torch.zeros(1, 2, 4), per_layer_input=torch.zeros(1, 2, 4))
    with pytest.raises(UnsupportedModel, match="argument 2"):
        blocks[0](torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


def test_groups_of_which_positions_see_only_a_part_are_those_of_windows() -> None:
    config = LlamaConfig()
    config._attn_implementation_internal = HANDED

    def within_two(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return query - column < 2

    how: dict[str, Any] = {"or_mask_function": within_two, "and_mask_function": within_two}
    part, plain = (create_causal_mask(config, torch.zeros(1, 4, 4), None, None, **given) for given in (how, {}))
    whole = create_causal_mask(config, torch.zeros(1, 4, 4), None, None, block_sequence_ids=torch.zeros(1, 4))
    # A window of two positions, as in Gemma 4.
    assert mask_of(sliding_attention=part, full_attention=plain) == ([[1, 1, 1, 1]], True)
    assert mask_of(sliding_attention=whole, full_attention=whole) == ([[1, 1, 1, 1]], False)
    others: list[dict[str, Any]] = [
        {"full_attention": part},
        {"sliding_attention": part, "full_attention": whole},
        {"sliding_attention": whole, "full_attention": plain},
        {"sliding_attention": plain, "full_attention": whole},
    ]
    for masks in others:
        with pytest.raises(UnsupportedModel, match="groups of positions that differ"):
            mask_of(**masks)


def mask_of(**masks: Any) -> tuple[list[list[int]], bool]:
    """The mask of blocks of some kinds, and whether its groups count only within windows of two positions."""
    handed = HandedStates(len(masks), window=2)
    for index, (kind, handed_mask) in enumerate(masks.items()):
        handed.receive(index, kind, torch.zeros(1, 4, 4), (), {"attention_mask": handed_mask})
    found, windowed = handed.mask()
    assert found is not None
    return found.tolist(), windowed
