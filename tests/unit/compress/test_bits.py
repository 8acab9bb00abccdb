"""Tests of `splitnet.compress.bits`."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from splitnet.compress.bits import best_bits, bits_of_weights
from splitnet.compress.rounding import BITS, Compression


@pytest.mark.parametrize("mean", [2.0, 2.3, 3.5, 4.25, 7.9, 8.0])
def test_the_best_bits_are_those_of_all_combinations(mean: float) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 50, (4,)).tolist()
        errors: list[dict[int, float]] = [
            dict(zip(BITS, sorted(torch.rand(len(BITS)).tolist(), reverse=True), strict=True)) for _ in sizes
        ]

        def error(bits: tuple[int, ...], errors: list[dict[int, float]] = errors) -> float:
            return sum(each[some] for each, some in zip(errors, bits, strict=True))

        def used(bits: tuple[int, ...], sizes: list[int] = sizes) -> int:
            return sum(size * some for size, some in zip(sizes, bits, strict=True))

        found = best_bits(sizes, errors, mean)
        assert used(found) <= mean * sum(sizes)
        fitting = [bits for bits in product(BITS, repeat=4) if used(bits) <= mean * sum(sizes)]
        assert error(found) == pytest.approx(min(map(error, fitting)))


def test_parts_that_change_the_outputs_more_have_more_bits() -> None:
    torch.manual_seed(0)
    weights = [{"first": torch.randn(8, 64), "second": torch.randn(24, 64)}, {"third": torch.randn(32, 64)}]
    before = [{name: weight.clone() for name, weight in part.items()} for part in weights]
    inputs = torch.randn(64, 100)

    def outputs() -> torch.Tensor:
        first, second, third = (weight @ inputs for part in weights for weight in part.values())
        return torch.cat([first, second, 10 * third])

    bits = bits_of_weights(weights, Compression(3.5, 32, ()), outputs)
    assert bits["first"] == bits["second"] < bits["third"]
    assert 32 * (bits["first"] + bits["third"]) == 3.5 * 64
    for part, exact in zip(weights, before, strict=True):
        for name in part:
            assert torch.equal(part[name], exact[name])
    assert set(bits_of_weights(weights, Compression(3, 32, ()), lambda: pytest.fail("not needed")).values()) == {3}
