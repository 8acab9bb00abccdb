"""Memory for held weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitnet.errors import OutOfMemory
from splitnet.quant.device import give_back_memory, guarded, in_large_pages, move_to_large_pages

MAPS = Path("/proc/self/smaps")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """The system's facts about the memory at an address."""
    inside = False
    for line in MAPS.read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            begin, end = (int(place, 16) for place in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return rest
    return []


@pytest.mark.parametrize("rows", [0, 3])
def test_memory_has_the_requested_size(rows: int) -> None:
    room = in_large_pages(rows, 5)
    room.fill_(7)
    assert room.shape == (rows, 5) and room.sum() == 7 * room.numel()


@pytest.mark.skipif(not (MAPS.exists() and SETTING.exists()), reason="the system has no large pages, or does not tell")
def test_large_pages_are_requested_for_private_memory() -> None:
    room = in_large_pages(8, 2**21)
    flags = flags_at(room.data_ptr() + room.nbytes // 2)
    assert "hg" in flags and "sh" not in flags


def test_small_weights_share_large_pages_and_do_not_overlap() -> None:
    rooms = [in_large_pages(3, 1000 + index).fill_(index) for index in range(100)]
    assert all(bool((room == index).all()) for index, room in enumerate(rooms))
    assert all(room.data_ptr() % 64 == 0 for room in rooms)
    assert len({room.data_ptr() // 2**21 for room in rooms}) <= 2


def test_weights_loaded_in_inference_mode_share_large_pages() -> None:
    give_back_memory()
    with torch.inference_mode():
        in_large_pages(1, 64).fill_(1)
    in_large_pages(1, 64).fill_(2)


def test_parameters_move_to_large_pages_unchanged() -> None:
    layer = nn.Linear(300, 200, dtype=torch.bfloat16).requires_grad_(False)
    weight, before = layer.weight, layer.weight.clone()
    move_to_large_pages(layer)
    assert layer.weight is weight and torch.equal(weight, before) and weight.data_ptr() % 64 == 0


def test_too_little_memory_says_how_many_blocks_would_fit() -> None:
    with (
        pytest.raises(OutOfMemory, match="blocks 1:3 of a model take"),
        guarded("a model", 1, 3, 1, torch.device("cpu")),
    ):
        in_large_pages(2**25, 2**25)
