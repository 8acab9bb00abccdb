"""Gradients are sent back in the order of their passes, and a batch is completed or repeated as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from splitnet.blocks.adapters import write_tensors
from splitnet.errors import ProtocolError
from splitnet.security.identity import Identity
from splitnet.session.requests import BackwardState, Batch, PassRequest, ReplayRequest
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import AdapterGradient, Forward, Gradient, Message, Replay, Result

SID = b"s" * 16
PAYLOAD = bytes(32)
"""Two positions of four values, uncompressed."""
SUMS = {"1.q.lora_A": [1.0] * 25, "4.q.lora_A": [2.0] * 25}
HEAD, TAIL = (Endpoint(f"tcp://127.0.0.1:{port}", Identity.generate().public) for port in (1, 2))


@dataclass
class FakeRoute:
    """Two hops, each with a part of the adapter."""

    epoch: int = 1
    hidden_size: int = 4
    blocks: tuple[int, int] = (0, 6)
    first_hop: Endpoint = HEAD
    tail: Endpoint = TAIL
    sent: list[tuple[Endpoint, Message]] = field(default_factory=list)

    def send_message(self, endpoint: Endpoint, message: Message) -> None:
        self.sent.append((endpoint, message))

    def endpoints(self) -> list[Endpoint]:
        return [HEAD, TAIL]

    def maker_of(self, boundary: int) -> Endpoint:
        return HEAD if boundary <= 3 else TAIL

    def adapted_hops(self) -> dict[Endpoint, dict[str, torch.Tensor]]:
        return {HEAD: {"1.q.lora_A": torch.ones(25)}, TAIL: {"4.q.lora_A": torch.full((25,), 2.0)}}

    def heard(self) -> list[Message]:
        messages = [message for _, message in self.sent]
        self.sent.clear()
        return messages


def passes(route: FakeRoute, count: int = 3) -> list[PassRequest]:
    made = [PassRequest(Forward(SID, 1, 10 + index, 0, (2,), True, 4, 0, 0)) for index in range(count)]
    for each in made:
        each.send(route)
    route.heard()
    return made


def result(each: PassRequest, epoch: int = 1) -> Result:
    return Result(SID, epoch, each.message.number, 6, 0, (), PAYLOAD)


def goes_back(made: list[PassRequest], route: FakeRoute) -> Batch:
    batch = Batch(made)
    for each in made:
        each.back = BackwardState(batch, 0, b"gradient")
    batch.go_back(4, route)
    return batch


def answer(made: list[PassRequest], route: FakeRoute) -> None:
    """Delivers every message that the peers send in reply to the gradients."""
    for each in made:
        each.take_answer(
            HEAD, Gradient(SID, route.epoch, each.message.number, 0, 10, each is not made[-1], 0, PAYLOAD), route
        )
    for hop in (HEAD, TAIL):
        assert not made[-1].is_done, "the sum of a hop is missing"
        payload = write_tensors(route.adapted_hops()[hop])
        made[-1].take_answer(hop, AdapterGradient(SID, route.epoch, made[-1].message.number, 0, payload), route)


def sent_back(route: FakeRoute) -> list[tuple[int, int, bool]]:
    """The number, `since` and `held` of each gradient sent."""
    return [(each.number, each.since, each.held) for each in route.heard() if isinstance(each, Gradient)]


IN_ORDER = [(10, 10, True), (11, 10, True), (12, 10, False)]


def test_adapter_gradients_are_summed_when_the_last_pass_goes_back() -> None:
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take_answer(TAIL, result(each), route)
    batch = goes_back(made, route)
    assert sent_back(route) == IN_ORDER
    assert not batch.is_done
    answer(made, route)
    assert all(each.is_done for each in made)
    assert {name: tensor.tolist() for name, tensor in batch.by_adapter.items()} == SUMS


def test_gradients_wait_until_a_pass_of_an_older_route_is_repeated() -> None:
    """Some passes have been repeated in the new epoch, but their gradients must not be sent before that of the first
    pass."""
    route = FakeRoute()
    made = passes(route)
    made[0].take_answer(TAIL, result(made[0]), route)
    route.epoch = 2
    for each in made[1:]:
        each.send(route)
        each.take_answer(TAIL, result(each, 2), route)
    route.heard()
    goes_back(made, route)
    repeated = route.heard()
    assert [(each.number, each.epoch) for each in repeated if isinstance(each, Forward)] == [(10, 2), (11, 2), (12, 2)]
    for index in (1, 2, 0):
        made[index].take_answer(TAIL, result(made[index], 2), route)
        assert sent_back(route) == (IN_ORDER if index == 0 else [])


def test_a_new_route_repeats_all_passes_of_a_batch() -> None:
    """A lost hop also loses its part of the gradient sums, including passes whose own gradient has arrived."""
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take_answer(TAIL, result(each), route)
    batch = goes_back(made, route)
    answer(made[:-1], replace(route, sent=[]))
    route.heard()
    route.epoch = 2
    for each in made:
        each.send(route)
    assert len(route.heard()) == 3
    for each in made:
        each.take_answer(TAIL, result(each, 2), route)
    assert sent_back(route) == IN_ORDER
    assert not batch.is_done
    answer(made, route)
    assert batch.is_done
    assert {name: tensor.tolist() for name, tensor in batch.by_adapter.items()} == SUMS


def of_the_adapter(remaining: int, payload: bytes = b"part") -> AdapterGradient:
    return AdapterGradient(SID, 1, 12, remaining, payload)


@pytest.mark.parametrize(
    ("first", "more", "text"),
    [
        (of_the_adapter(1), of_the_adapter(1), "not in order"),
        (of_the_adapter(2**40), of_the_adapter(2**40 - 1, b""), "more than was asked for"),
        (of_the_adapter(1), of_the_adapter(0, bytes(5000)), "more than was asked for"),
    ],
)
def test_adapter_gradients_larger_than_the_adapter_are_refused(
    first: AdapterGradient, more: AdapterGradient, text: str
) -> None:
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take_answer(TAIL, result(each), route)
    goes_back(made, route)
    assert made[-1].take_answer(HEAD, first, route)
    with pytest.raises(ProtocolError, match=text):
        for index in range(100):
            made[-1].take_answer(HEAD, replace(more, remaining=max(0, more.remaining - index)), route)


def test_a_repeated_answer_is_no_progress() -> None:
    route = FakeRoute()
    made = passes(route)
    assert made[0].take_answer(TAIL, result(made[0]), route) and not made[0].take_answer(TAIL, result(made[0]), route)
    gradient = Gradient(SID, 1, made[0].number, 0, 10, True, 0, PAYLOAD)
    assert made[0].take_answer(HEAD, gradient, route) and not made[0].take_answer(HEAD, gradient, route)


def test_only_the_last_hop_of_a_replay_ends_it() -> None:
    route = FakeRoute()
    replay = ReplayRequest(Replay(SID, 1, 9, 6), to=HEAD, last=TAIL)
    with pytest.raises(ProtocolError):
        replay.take_answer(HEAD, Result(SID, 1, 9, 6, 0, ()), route)
    stranger = replace(TAIL, address="tcp://127.0.0.1:3")
    assert not replay.take_answer(stranger, Result(SID, 1, 9, 6, 0, ()), route) and not replay.is_done
    assert replay.take_answer(TAIL, Result(SID, 1, 9, 6, 0, ()), route) and replay.is_done


WRONG = {
    "not finite": {"1.q.lora_A": torch.full((25,), float("nan"))},
    "of another shape": {"1.q.lora_A": torch.ones(5, 5)},
    "of other parameters": {"1.q.lora_B": torch.ones(25)},
    "numbers of another kind": {"1.q.lora_A": torch.ones(25, dtype=torch.int32)},
    "of another hop, too": {"1.q.lora_A": torch.ones(25), "3.q.lora_A": torch.full((25,), 7, dtype=torch.int32)},
    "of another kind of floats": {"1.q.lora_A": torch.ones(25, dtype=torch.float8_e4m3fn)},
    "missing": {},
}


@pytest.mark.parametrize("tensors", WRONG.values(), ids=WRONG)
def test_adapter_gradients_that_are_not_finite_or_do_not_fit_the_adapter_are_refused(
    tensors: dict[str, torch.Tensor],
) -> None:
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take_answer(TAIL, result(each), route)
    batch = goes_back(made, route)
    with pytest.raises(ProtocolError, match="its gradients are"):
        made[-1].take_answer(HEAD, of_the_adapter(0, write_tensors(tensors)), route)
    assert not batch.by_adapter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", ["none", "fp16", "bf16"])
def test_an_answer_that_is_not_finite_is_refused(codec: str, value: float) -> None:
    route = FakeRoute()
    (made,) = passes(route, 1)
    numbers = np.full(8, value, "<f4")
    payload = {"none": numbers, "fp16": numbers.astype("<f2"), "bf16": numbers.view("<u2")[1::2]}[codec].tobytes()
    with pytest.raises(ProtocolError, match="not finite"):
        made.take_answer(TAIL, replace(result(made), codec=codec_by_name(codec).code, payload=payload), route)
    made.take_answer(TAIL, result(made), route)
    goes_back([made], route)
    gradient = Gradient(SID, 1, made.message.number, 0, 10, False, codec_by_name(codec).code, payload)
    with pytest.raises(ProtocolError, match="not finite"):
        made.take_answer(HEAD, gradient, route)
    assert made.result is not None and made.gradient is None
