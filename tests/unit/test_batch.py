"""Gradients go back in the order of their passes, and a batch is done, or repeated, as one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from splitnet.client.requests import Batch, PassRequest, WayBack
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import Identity
from splitnet.net.messages import AdapterGradient, Forward, Gradient, Message, Result

SID = b"s" * 16
PAYLOAD = bytes(32)
"""Two positions of four values, uncompressed."""
HEAD, TAIL = (Endpoint(f"tcp://127.0.0.1:{port}", Identity.generate().public) for port in (1, 2))


@dataclass
class FakeRoute:
    """Two hops, both with a part of the adapter."""

    epoch: int = 1
    hidden_size: int = 4
    blocks: tuple[int, int] = (0, 6)
    first: Endpoint = HEAD
    tail: Endpoint = TAIL
    sent: list[tuple[Endpoint, Message]] = field(default_factory=list)

    def send(self, endpoint: Endpoint, message: Message) -> None:
        self.sent.append((endpoint, message))

    def endpoints(self) -> list[Endpoint]:
        return [HEAD, TAIL]

    def adapted_hops(self) -> set[Endpoint]:
        return {HEAD, TAIL}

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
    return Result(SID, epoch, each.forward.number, 6, 0, (), PAYLOAD)


def goes_back(made: list[PassRequest], route: FakeRoute) -> Batch:
    batch = Batch(made)
    for each in made:
        each.back = WayBack(batch, 0, b"gradient")
    batch.go_back(4, route)
    return batch


def answer(made: list[PassRequest], route: FakeRoute) -> None:
    """All that the peers send for the gradients."""
    for each in made:
        each.take(HEAD, Gradient(SID, route.epoch, each.forward.number, 0, 10, each is not made[-1], 0, PAYLOAD), route)
    for hop in (HEAD, TAIL):
        made[-1].take(hop, AdapterGradient(SID, route.epoch, made[-1].forward.number, 0, hop.address.encode()), route)


def sent_back(route: FakeRoute) -> list[tuple[int, int, bool]]:
    """Number, since and held of the gradients that were sent."""
    return [(each.number, each.since, each.held) for each in route.heard() if isinstance(each, Gradient)]


IN_ORDER = [(10, 10, True), (11, 10, True), (12, 10, False)]


def test_the_sum_is_asked_for_with_the_last_pass() -> None:
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take(TAIL, result(each), route)
    batch = goes_back(made, route)
    assert sent_back(route) == IN_ORDER
    assert not batch.done
    answer(made, route)
    assert all(each.done for each in made)
    assert batch.by_adapter == {hop: [hop.address.encode()] for hop in (HEAD, TAIL)}


def test_a_pass_of_an_older_route_has_all_repeated_and_sent_back_in_order() -> None:
    """Some have gone through again in the new epoch already, but their gradients must not overtake the first."""
    route = FakeRoute()
    made = passes(route)
    made[0].take(TAIL, result(made[0]), route)
    route.epoch = 2
    for each in made[1:]:
        each.send(route)
        each.take(TAIL, result(each, 2), route)
    route.heard()
    goes_back(made, route)
    repeated = route.heard()
    assert [(each.number, each.epoch) for each in repeated if isinstance(each, Forward)] == [(10, 2), (11, 2), (12, 2)]
    for index in (1, 2, 0):
        made[index].take(TAIL, result(made[index], 2), route)
        assert sent_back(route) == (IN_ORDER if index == 0 else [])


def test_a_batch_is_repeated_as_one() -> None:
    """A hop that died took its part of the sum along, also of passes whose own gradient has come."""
    route = FakeRoute()
    made = passes(route)
    for each in made:
        each.take(TAIL, result(each), route)
    batch = goes_back(made, route)
    answer(made[:-1], replace(route, sent=[]))
    route.heard()
    route.epoch = 2
    for each in made:
        each.send(route)
    assert len(route.heard()) == 3
    for each in made:
        each.take(TAIL, result(each, 2), route)
    assert sent_back(route) == IN_ORDER
    assert not batch.done
    answer(made, route)
    assert batch.done
    assert batch.by_adapter[HEAD] == [HEAD.address.encode()]
