"""Which model a name means, as anybody may claim a name; limits on time and bytes of strangers' answers."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from splitnet.checkpoint.transfer import manifest_search
from splitnet.checkpoint.transfer.manifest import Manifest, Pieces, Tensor, digest
from splitnet.checkpoint.transfer.manifest_search import (
    ANSWER_LIMIT_S,
    ANSWER_S,
    MAX_ASKED,
    MAX_MODELS,
    MAX_PEER_S,
    NEXT_PEER_S,
    find_manifest,
    whole,
)
from splitnet.directory.record import PeerRecord
from splitnet.errors import ModelNotFound
from splitnet.security.identity import Identity
from splitnet.transport.addresses import peer_address
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_PART_BYTES, Announced, Failure, FailureCode, Message, WeightsKind, WeightsPart
from tests.attacks.directory import fake_record
from tests.attacks.weights import Known

Answer = Callable[[int, WeightsKind, bytes, int], "Message | None"]
"""A peer's answer to a question with this number, kind, name and offset; None: the peer is silent."""


@dataclass
class Asked:
    """Peers that are asked, in simulated time: a second passes while no peer answers."""

    now: float = 0.0
    peers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    """By address."""
    late: list[tuple[float, Endpoint, Message]] = field(default_factory=list[tuple[float, Endpoint, Message]])
    numbers: int = 0

    @property
    def answers(self) -> Asked:
        return self

    def get(self, timeout: float) -> tuple[Endpoint, Message]:
        self.late.sort(key=lambda one: one[0])
        if self.late and self.late[0][0] <= self.now:
            return self.late.pop(0)[1:]
        self.now += 1.0
        raise queue.Empty

    def ask_peer(self, peer: Endpoint, kind: WeightsKind, name: bytes, offset: int = 0) -> int:
        self.numbers += 1
        answer = self.peers[peer.address](self.numbers, kind, name, offset) if peer.address in self.peers else None
        if answer is not None:
            wait = 9.0 if isinstance(answer, Slow) else 1.0 if isinstance(answer, Steady) else 0.0
            self.late.append((self.now + wait, peer, answer))
        return self.numbers

    def forget_question(self, number: int) -> None:
        self.late = [one for one in self.late if getattr(one[2], "number", 0) != number]

    def is_gone(self, peer: Endpoint) -> bool:
        return False


class Slow(WeightsPart):
    """A part for which a peer takes almost the maximum time."""

    TAG = 0


class Steady(WeightsPart):
    """A part on a slow link."""

    TAG = 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    asked = Asked()
    with monkeypatch.context() as patch:
        patch.setattr(manifest_search.time, "monotonic", lambda: asked.now)
        yield asked


def model_of(seed: int) -> Manifest:
    return Manifest(f'{{"seed": {seed}}}', (Tensor("a", "F32", (1,), Pieces(4, digest(bytes([seed])))),))


def telling(manifest: Manifest, kind: type[WeightsPart] = WeightsPart) -> Answer:
    packed = manifest.pack()
    return lambda number, _, name, offset: kind(number, len(packed), packed[offset : offset + MAX_PART_BYTES])


def dripping(number: int, kind: WeightsKind, name: bytes, offset: int) -> Message:
    return Slow(number, 64 << 20, bytes(MAX_PART_BYTES))


def peer_of(model: str, port: int, name: str = "llama") -> tuple[PeerRecord, str]:
    record = fake_record(Identity.generate(), model, model_name=name, address=f"tcp://10.0.0.1:{port}")
    return record, record.address


def test_models_that_nobody_tells_do_not_hide_the_one_that_somebody_does(asked: Any) -> None:
    """The model is also found if more models have its name than are asked about, and its peer was joined through."""
    manifest = model_of(1)
    honest, address = peer_of(manifest.fingerprint, 1)
    fakes = [peer_of(f"{index:064x}", 100 + index)[0] for index in range(MAX_MODELS + 1)]
    asked.peers[address] = telling(manifest)
    found = find_manifest(Known(honest, *fakes), asked, "llama")
    assert found == (manifest, "llama")
    began = asked.now
    found = find_manifest(Known(*fakes, honest), asked, "llama", joined=[peer_address(honest.endpoint)])
    assert found == (manifest, "llama")
    assert asked.now - began <= ANSWER_S + 2
    assert find_manifest(Known(honest, *fakes), asked, "other") is None
    with pytest.raises(ModelNotFound, match="does not answer"):
        find_manifest(Known(*fakes), asked, "llama")


def test_of_several_models_that_of_the_peer_joined_through_is_meant(asked: Any) -> None:
    own, other = model_of(1), model_of(2)
    records = [peer_of(own.fingerprint, 1)[0], peer_of(other.fingerprint, 2)[0]]
    for record, manifest in zip(records, (own, other), strict=True):
        asked.peers[record.address] = telling(manifest)
    with pytest.raises(ModelNotFound, match=f"2 models of this swarm are called llama: .*{other.fingerprint}"):
        find_manifest(Known(*records), asked, "llama")
    for record, manifest in zip(records, (own, other), strict=True):
        joined = [peer_address(record.endpoint)]
        assert find_manifest(Known(*records), asked, "llama", joined=joined) == (manifest, "llama")
    with pytest.raises(ModelNotFound, match="2 models"):  # both are at the host of the node
        find_manifest(Known(*records), asked, "llama", joined=["/ip4/10.0.0.1/tcp/9/p2p/Qm"])


def test_peers_that_tell_slowly_hold_nobody_up_for_long(asked: Any) -> None:
    """All peers of eight models, eight each, are slow; then one peer is found."""
    records: list[PeerRecord] = []
    for index in range(MAX_MODELS):
        some = [peer_of(f"{index:064x}", 100 * index + port)[0] for port in range(1, MAX_ASKED + 2)]
        asked.peers |= {record.address: dripping for record in some}
        records += some
    with pytest.raises(ModelNotFound, match="takes too long"):
        find_manifest(Known(*records), asked, "llama")
    assert asked.now <= MAX_ASKED * (ANSWER_LIMIT_S + 1) + MAX_PEER_S + ANSWER_S
    began, manifest = asked.now, model_of(1)
    liars = [peer_of(manifest.fingerprint, 9000 + port)[0] for port in range(MAX_ASKED - 1)]
    asked.peers |= {record.address: dripping for record in liars}
    honest, address = peer_of(manifest.fingerprint, 1)
    asked.peers[address] = telling(manifest, Slow)
    found = find_manifest(Known(*liars, honest), asked, "llama", expected=manifest.fingerprint)
    assert found is not None and asked.now - began <= MAX_ASKED * (NEXT_PEER_S + 1) + ANSWER_S


@pytest.mark.parametrize(("seconds", "also"), [(ANSWER_LIMIT_S / 2, False), (ANSWER_LIMIT_S * 1.5, True)])
def test_peers_share_a_slow_link_only_where_one_would_take_long(asked: Any, seconds: float, also: bool) -> None:
    """On a slow link all would take longer, and none might finish in time."""
    total = int(seconds) * MAX_PART_BYTES
    first, second = (peer_of("0" * 64, port)[0] for port in (1, 2))
    others: list[float] = []

    def steady(number: int, kind: WeightsKind, name: bytes, offset: int) -> Message:
        return Steady(number, total, bytes(MAX_PART_BYTES))

    def other(number: int, kind: WeightsKind, name: bytes, offset: int) -> Message:
        others.append(asked.now)
        return Failure(bytes(16), 0, number, 0, "")

    asked.peers = {first.address: steady, second.address: other}
    with pytest.raises(ModelNotFound, match="no valid manifest"):
        find_manifest(Known(first, second), asked, "llama")
    assert others and (others[0] < seconds) == also


def test_what_all_tell_together_is_bounded(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer that has sent most is dropped, not the last one."""
    monkeypatch.setattr(manifest_search, "MAX_ANSWER_BYTES", 5 * MAX_PART_BYTES)
    most = 0
    bound = manifest_search._Race._bound

    def watched(race: Any) -> None:
        nonlocal most
        bound(race)
        most = max(most, sum(one.nbytes for one in race._asked.values()))

    monkeypatch.setattr(manifest_search._Race, "_bound", watched)
    manifest = model_of(1)
    liars = [peer_of(f"{index:064x}", 100 + index)[0] for index in range(MAX_MODELS - 1)]
    asked.peers |= {
        record.address: lambda number, *_: WeightsPart(number, 64 << 20, bytes(MAX_PART_BYTES)) for record in liars
    }
    honest, address = peer_of(manifest.fingerprint, 1)
    asked.peers[address] = telling(manifest, Slow)
    assert find_manifest(Known(*liars, honest), asked, "llama") == (manifest, "llama")
    assert 0 < most <= 5 * MAX_PART_BYTES


def answered(answer: Callable[[int], Message]) -> tuple[bytes, int]:
    """The joined answer to a question whose parts a peer answers by `answer`, and the number of parts."""
    telling = whole(WeightsKind.MANIFEST, bytes(32))
    _, _, offset = next(telling)
    for parts in range(1, 99):
        try:
            _, _, offset = telling.send(answer(offset))
        except StopIteration as told:
            return bytes(told.value), parts
    pytest.fail("it is asked again and again")


@pytest.mark.parametrize("size", [0, 1, MAX_PART_BYTES, MAX_PART_BYTES + 1, 3 * MAX_PART_BYTES])
def test_parts_are_joined(size: int) -> None:
    data = bytes(size)
    got, parts = answered(lambda offset: WeightsPart(1, size, data[offset : offset + MAX_PART_BYTES]))
    assert got == data and parts == max(1, -(-size // MAX_PART_BYTES))


@pytest.mark.parametrize(
    "answer",
    [
        lambda offset: WeightsPart(1, 1 << 20, b"x"),  # one byte at a time
        lambda offset: WeightsPart(1, 1 << 20, b""),
        lambda offset: WeightsPart(1, 1, b"xx"),
        lambda offset: WeightsPart(1, (3 << 20) - 3 * offset, bytes(MAX_PART_BYTES)),
        lambda offset: WeightsPart(1, 256 << 20, bytes(MAX_PART_BYTES)),
        lambda offset: Announced(1, False),
    ],
)
def test_who_answers_less_or_more_than_it_says_is_not_asked_on(answer: Callable[[int], Message]) -> None:
    with pytest.raises(ModelNotFound, match="its answer is invalid"):
        answered(answer)


def test_a_refusal_is_reported() -> None:
    with pytest.raises(ModelNotFound, match="no such model"):
        answered(lambda offset: Failure(b"", 0, 1, FailureCode.WRONG_MODEL, "no such model"))
