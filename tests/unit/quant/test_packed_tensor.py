"""Weights in few bits keep their codes through the operations of transformers while it loads."""

from __future__ import annotations

import torch
from torch import nn

from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, ScaleFormat, StoredMatrix

FOUR_BITS = CodeLayout(4, 32, ScaleFormat.FLOAT16, offset=8)


def matrix(outputs: int, inputs: int) -> StoredMatrix:
    codes = Codes(torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8), torch.rand(outputs, inputs // 32).half())
    return StoredMatrix(FOUR_BITS, (outputs, inputs), lambda: codes)


def stored(outputs: int = 8, inputs: int = 64) -> torch.Tensor:
    return PackedTensor.of(matrix(outputs, inputs))


def floats(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, PackedTensor)
    return tensor.to_floats()


def same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the tensor has kept its codes and decodes to the expected numbers."""
    return isinstance(tensor, PackedTensor) and torch.equal(tensor.to_floats(), expected)


def test_experts_are_stacked_and_joined() -> None:
    gates, ups = [stored() for _ in range(3)], [stored(16) for _ in range(3)]
    together = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
    expected = torch.cat([torch.stack([floats(one) for one in half]) for half in (gates, ups)], dim=1)
    assert same(together, expected)
    assert same(together.transpose(1, 2), expected.transpose(1, 2))
    assert same(gates[0].T, floats(gates[0]).T)
    assert same(together[1], expected[1])
    assert same(together[1:], expected[1:])
    assert same(together[:, 4:12], expected[:, 4:12])
    assert all(same(*pair) for pair in zip(together.chunk(2, dim=1), expected.chunk(2, dim=1), strict=True))


def test_a_parameter_keeps_its_codes_in_the_requested_type() -> None:
    given = stored()
    parameter = nn.Parameter(given.to(torch.bfloat16), requires_grad=False)
    assert same(parameter, floats(given).bfloat16())
    assert parameter.dtype == torch.bfloat16


def test_outputs_are_chosen_in_any_order() -> None:
    first, second = stored(), stored(16)
    order = torch.randperm(24)
    joined = torch.cat([first, second])
    assert same(joined.index_select(0, order), torch.cat([floats(first), floats(second)])[order])
    experts = torch.stack([stored(), stored()])
    assert same(experts.index_select(1, torch.tensor([7, 0])), floats(experts)[:, [7, 0]])
    assert same(experts.index_select(0, torch.tensor([1, 0])), floats(experts)[[1, 0]])

    codes = Codes(torch.randint(0, 256, (4, 64), dtype=torch.uint8), torch.rand(4, 2).half())
    other = PackedTensor.of(StoredMatrix(CodeLayout(8, 32, ScaleFormat.FLOAT16), (4, 64), lambda: codes))
    mixed = torch.cat([stored(), other])
    order = torch.tensor([11, 3, 4, 8, 9, 0])
    chosen = mixed.index_select(0, order)
    assert same(chosen, floats(mixed)[order])
    # One matrix per run of rows of the same layout.
    assert isinstance(chosen, PackedTensor) and len(chosen.experts[0]) == 4


def test_inputs_that_share_a_scale_stay_together() -> None:
    given = stored(8, 128)
    groups = torch.tensor([2, 0, 3, 1])
    order = (groups[:, None] * 32 + torch.arange(32)).flatten()
    assert same(given.index_select(1, order), floats(given)[:, order])
    parted = given.index_select(1, order.flip(0))
    assert type(parted) is torch.Tensor and torch.equal(parted, floats(given)[:, order.flip(0)])


def test_steps_whose_unit_is_split_become_numbers() -> None:
    layout = CodeLayout(4, 32, ScaleFormat.STEPS, ScaleFormat.STEPS)
    codes = torch.randint(0, 16, (4, 512), dtype=torch.uint8)
    steps = torch.randint(0, 64, (2, 4, 16), dtype=torch.uint8)
    units = torch.rand(2, 4, 2).half()
    whole = Codes(codes, steps[0], steps[1], units[0], -units[1])
    given = PackedTensor.of(StoredMatrix(layout, (4, 512), lambda: whole))
    for run, kind in ((256, ScaleFormat.STEPS), (128, ScaleFormat.FLOAT32)):
        order = (torch.arange(512 // run).flip(0)[:, None] * run + torch.arange(run)).flatten()
        chosen = given.index_select(1, order)
        assert same(chosen, floats(given)[:, order])
        assert isinstance(chosen, PackedTensor) and chosen.experts[0][0].layout.scale is kind


def test_other_operations_use_floats() -> None:
    given = stored()
    assert torch.equal(given + 1, floats(given) + 1)
    assert torch.equal(given.view(4, 128), floats(given).view(4, 128))
    joined = torch.cat([given, torch.ones(8, 64)])
    assert type(joined) is torch.Tensor and torch.equal(joined[:8], floats(given))


def test_values_of_codes() -> None:
    codes = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[2.0, 4.0]]), torch.tensor([[1, 9]], dtype=torch.uint8)
    made = Codes(codes, scales, zeros).to_floats(CodeLayout(4, 2, ScaleFormat.FLOAT32, ScaleFormat.CODES))
    assert made.tolist() == [[-2.0, 28.0, -4.0, 0.0]]
    made = Codes(codes, scales, -scales).to_floats(CodeLayout(4, 2, ScaleFormat.FLOAT32, ScaleFormat.FLOAT32, offset=8))
    assert made.tolist() == [[-18.0, 12.0, -4.0, 0.0]]
    made = Codes(codes, torch.tensor([[128]], dtype=torch.uint8)).to_floats(
        CodeLayout(4, 0, ScaleFormat.E8M0, table="e2m1")
    )
    assert made.tolist() == [[0.0, -12.0, -0.0, -1.0]]
    units = torch.tensor([[0.5]], dtype=torch.float16)
    steps = torch.tensor([[3, -1]], dtype=torch.int8)
    made = Codes(codes, steps, scale_units=units).to_floats(CodeLayout(4, 2, ScaleFormat.STEPS, offset=8))
    assert made.tolist() == [[-12.0, 10.5, 0.0, -0.5]]
