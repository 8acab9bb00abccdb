"""A screened head: tokens and logits are those of the whole head, to the last bit."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from splitnet.blocks import head as head_module
from splitnet.blocks.head import STATES, Head
from splitnet.blocks.screen import MOST_SHARE, Screen
from splitnet.quant.native import has_fast_kernels, multiply_floats

pytestmark = pytest.mark.skipif(not has_fast_kernels(), reason="the kernels were not compiled for this CPU")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WAIT_S = 60.0


def head_of(outputs: int, inputs: int, kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    if kind == "ties":  # equal rows, in and outside the last block
        weight[torch.randint(outputs, (outputs // 2,), generator=generator)] = weight[-1].clone()
    elif kind == "zeros":
        weight[: outputs // 2] = 0
        weight[:, : inputs // 2] = 0
    elif kind == "outliers":
        weight[:, :2] *= 300
        weight[::7] *= 1e-6
    elif kind == "small":
        weight *= 1e-25
    elif kind == "offset":
        weight += 5
    return weight.to(dtype)


def states_of(count: int, inputs: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    states = torch.randn(count, inputs, generator=generator) * scale
    states[:, 0] *= 20  # as in language models, one number is much larger
    return states.to(dtype)


def check_row(screen: Screen, weight: torch.Tensor, state: torch.Tensor, count: int) -> bool:
    """Compares with the whole head. Whether the bounds decided."""
    whole = multiply_floats(state[None], weight)[0]
    estimates = screen.copy.multiply(state[None].float())[0]
    found = screen.best_logits(state, estimates, count)
    if found is None:
        return False
    assert found.dtype == whole.dtype
    kept = found > -math.inf
    least = whole.float().topk(min(count, len(whole))).values[-1]
    assert torch.equal(found[kept], whole[kept])
    assert bool((whole[~kept].float() < least).all())
    for temperature in (0.7, 1.3, 900.0):
        assert bool((whole[~kept].float() / temperature < least / temperature).all())
    return True


@given(
    outputs=st.integers(4, 700),
    groups=st.integers(1, 5),
    kind=st.sampled_from(["plain", "ties", "zeros", "outliers", "small", "offset"]),
    dtype=st.sampled_from(TYPES),
    count=st.sampled_from([1, 2, 20, 50]),
    scale=st.sampled_from([1e-12, 1.0, 30.0]),
    unusual=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_logits_are_those_of_the_whole_head_whatever_the_head(
    outputs: int, groups: int, kind: str, dtype: torch.dtype, count: int, scale: float, unusual: bool, seed: int
) -> None:
    weight = head_of(outputs, 32 * groups, kind, dtype, seed)
    states = states_of(3, 32 * groups, dtype, seed, scale)
    sizes = states.float().flip(1).square().mean(0).sqrt() if unusual else states.float().abs().amax(0)
    screen = Screen.of(weight, sizes)
    assert screen is not None
    for state in states:
        check_row(screen, weight, state, count)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("outputs", [20000, 20003])
def test_bounds_decide_for_usual_heads(outputs: int, dtype: torch.dtype) -> None:
    weight = head_of(outputs, 256, "plain", dtype, 0)
    states = states_of(40, 256, dtype, 0)
    screen = Screen.of(weight, states.float().square().mean(0).sqrt())
    assert screen is not None
    assert all(check_row(screen, weight, state, count) for state in states for count in (1, 20))


def test_errors_are_within_the_bounds_and_not_far_below() -> None:
    """Otherwise other tests might pass with bounds that are too small, because most heads need no large ones."""
    weight = head_of(4000, 64, "plain", torch.float32, 0)
    states = states_of(200, 64, torch.float32, 0)
    screen = Screen.of(weight, states.square().mean(0).sqrt())
    assert screen is not None
    errors = (states.double() @ weight.double().T - screen.copy.multiply(states)).abs()
    reach = (states / screen._scales).norm(dim=1)
    share = errors / (reach[:, None] * screen._errors + states.norm(dim=1)[:, None] * screen._roundings)
    assert 0.4 < float(share.max()) <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_need_the_whole_head(value: float) -> None:
    weight = torch.randn(100, 32)
    screen = Screen.of(weight, torch.ones(32))
    state = torch.randn(32)
    state[3] = value
    assert screen is not None and not check_row(screen, weight, state, 1)
    assert not check_row(screen, weight, torch.zeros(32), 1)
    assert not check_row(screen, weight, torch.full((32,), 1e35), 1)
    weight[5, 5] = value
    assert Screen.of(weight, torch.ones(32)) is None


def test_a_screen_needs_a_whole_block() -> None:
    assert Screen.of(torch.randn(3, 32), torch.ones(32)) is None
    assert Screen.if_faster(torch.randn(64, 33), torch.ones(33)) is None


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> Head:
    """A head with a screen, which it has made from `STATES` states."""
    monkeypatch.setattr(head_module, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(Screen, "if_faster", Screen.of)  # whatever this machine measures
    head = Head(nn.Parameter(head_of(20003, 64, "plain", torch.bfloat16, 0)), None)
    make_screen(head)
    return head


@torch.no_grad()
def make_screen(head: Head) -> None:
    before = {*threading.enumerate()}
    head.best_logits(states_of(STATES // 4 - 1, 64, torch.bfloat16, 7)[:1], 1)
    for begin in range(0, STATES, 16):
        head.best_logits(states_of(16, 64, torch.bfloat16, begin), 1)
    for thread in {*threading.enumerate()} - before:
        thread.join(WAIT_S)
    assert head._copy is not None and head._copy.screen is not None


@torch.no_grad()
def test_a_head_screens_after_some_states(screened: Head) -> None:
    states = states_of(4, 64, torch.bfloat16, 9)
    whole, best = screened(states), screened.best_logits(states, 5)
    kept = best > -math.inf
    assert torch.equal(best[kept], whole[kept]) and 5 * 4 <= int(kept.sum()) < MOST_SHARE * kept.numel()
    assert torch.equal(best.argmax(1), whole.argmax(1))
    assert torch.equal(screened.best_logits(states[None], 5)[0], best)
    many = states.repeat(5, 1)
    assert torch.equal(screened.best_logits(many, 5), screened(many)), "many rows use the whole head"
    with torch.enable_grad():
        assert bool(screened.best_logits(states, 5).isfinite().all())


@torch.no_grad()
def test_a_row_that_is_not_decided_uses_the_whole_head_and_so_do_some_after_it(screened: Head) -> None:
    states = states_of(2, 64, torch.bfloat16, 9)
    whole = screened(states)
    both = screened.best_logits(torch.stack((states[0], torch.zeros_like(states[0]))), 1)
    assert bool((both[0] == -math.inf).any()) and torch.equal(both[1], torch.zeros_like(both[1]))
    assert torch.equal(screened.best_logits(states, 1), whole)
    assert bool((screened.best_logits(states, 1) == -math.inf).any())


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False])
def test_a_changed_weight_has_no_screen_until_it_is_made_again(screened: Head, told: bool) -> None:
    states = states_of(2, 64, torch.bfloat16, 9)
    if told:
        screened.weight.data[17] += 9
        screened.expect_changes()
    else:
        screened.weight.data *= -1
    assert torch.equal(screened.best_logits(states, 1), screened(states))
    make_screen(screened)
    best = screened.best_logits(states, 1)
    assert torch.equal(best.argmax(1), screened(states).argmax(1)) and bool((best == -math.inf).any())
    assert copy.deepcopy(screened)._copy is None


@torch.no_grad()
def test_hooks_see_all_logits(screened: Head) -> None:
    seen: list[Any] = []
    states = states_of(1, 64, torch.bfloat16, 9)
    with screened.register_forward_hook(lambda module, given, output: seen.append(output)):
        assert torch.equal(screened.best_logits(states, 1), seen[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 20, 50])
def test_samples_are_the_same(screened: Head, count: int) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(count), TopPLogitsWarper(0.95)])
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    for seed, state in enumerate(states_of(50, 64, torch.bfloat16, 11)):
        whole, best = (each(state[None]) for each in (screened, lambda rows: screened.best_logits(rows, count)))
        scores: list[Any] = [warpers(ids, logits.float()) for logits in (whole, best)]
        assert torch.equal(*scores)
        torch.manual_seed(seed)
        expected = torch.multinomial(scores[0].softmax(-1), 1)
        torch.manual_seed(seed)
        assert torch.equal(torch.multinomial(scores[1].softmax(-1), 1), expected)
