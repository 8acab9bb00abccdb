"""What a peer gives of its weights: to each key in turn, at a rate, and nothing that it should not."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peers.peer_options import PeerOptions
from peers.weights import QUESTION_BYTES, SERVING_SHARE, WAITING_PER_KEY, WeightService
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.manifest import Manifest, digest
from splitnet.checkpoint.transfer.weight_pieces import HeldPieces
from splitnet.limits import MINUTE_S, TokenBucket
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import OPEN, SwarmKey
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import MAX_PART_BYTES, AskWeights, Failure, FailureCode, Message, WeightsKind, WeightsPart
from tests.unit.random_models import random_checkpoint


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> HeldPieces:
    folder: Path = random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny", blocks=2)
    return Checkpoint.open(folder).held_pieces()


class Asker:
    def __init__(self, held: HeldPieces, **options: Any) -> None:
        self.answers: queue.Queue[tuple[Connection, Message]] = queue.Queue()
        self.swarm = options.get("swarm", OPEN)
        given: dict[str, Any] = {"shares": lambda: True} | options
        self.service = WeightService(held, self, **given)
        self.number = 0

    def send(self, destination: Any, message: Message) -> None:
        self.answers.put((destination, message))

    def ask(
        self, kind: int, name: bytes, offset: int = 0, length: int = MAX_PART_BYTES, key: bytes = b"k" * 32
    ) -> None:
        self.number += 1
        self.service.receive_request(Connection(b"route", key), AskWeights(self.number, kind, name, offset, length))

    def answer(self) -> Any:
        return self.answers.get(timeout=10)[1]

    def __enter__(self) -> Asker:
        self.service.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.service.close()


def test_a_manifest_comes_in_parts_and_pieces_are_right(held: HeldPieces) -> None:
    name = bytes.fromhex(held.manifest.fingerprint)
    with Asker(held) as asker:
        data = b""
        while True:
            asker.ask(WeightsKind.MANIFEST, name, len(data), 1000)
            part = asker.answer()
            assert isinstance(part, WeightsPart) and len(part.payload) <= 1000
            data += part.payload
            if len(data) == part.total:
                break
        assert Manifest.unpack(data) == held.manifest
        asker.ask(WeightsKind.HELD, name)
        assert asker.answer().payload == held.bits()
        for piece in held.piece_names:
            asker.ask(WeightsKind.PIECE, piece)
            assert digest(asker.answer().payload) == piece


def test_what_is_not_here_or_not_shared_is_refused(held: HeldPieces) -> None:
    name, piece = bytes.fromhex(held.manifest.fingerprint), next(iter(held.piece_names))
    with Asker(held) as asker:
        for kind, asked in ((WeightsKind.MANIFEST, bytes(32)), (WeightsKind.PIECE, bytes(32)), (77, name)):
            asker.ask(kind, asked)
            assert isinstance(asker.answer(), Failure)
    with Asker(held, shares=lambda: False) as asker:
        asker.ask(WeightsKind.MANIFEST, name)
        assert isinstance(asker.answer(), WeightsPart)
        for kind, asked in ((WeightsKind.HELD, name), (WeightsKind.PIECE, piece)):
            asker.ask(kind, asked)
            assert isinstance(asker.answer(), Failure)


def test_members_of_a_closed_swarm_name_what_nobody_else_can(held: HeldPieces) -> None:
    key, piece = SwarmKey.generate(), next(iter(held.piece_names))
    with Asker(held, swarm=key) as asker:
        for kind, name in (
            (WeightsKind.MANIFEST, bytes.fromhex(held.manifest.fingerprint)),
            (WeightsKind.PIECE, piece),
        ):
            asker.ask(kind, name)
            assert isinstance(asker.answer(), Failure)
            asker.ask(kind, bytes.fromhex(key.place(name.hex())))
            assert isinstance(asker.answer(), WeightsPart)


def test_a_piece_that_is_not_what_it_was_is_not_given(held: HeldPieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_read_slot", lambda slot: b"damaged")
    with Asker(held) as asker:
        asker.ask(WeightsKind.PIECE, next(iter(held.piece_names)))
        assert isinstance(asker.answer(), Failure)


def test_keys_take_turns_and_wait_in_bounded_numbers(held: HeldPieces) -> None:
    name = bytes.fromhex(held.manifest.fingerprint)
    asker = Asker(held)  # it has not begun to answer
    for _ in range(WAITING_PER_KEY):
        asker.ask(WeightsKind.HELD, name)
    asker.ask(WeightsKind.HELD, name)
    refused = asker.answer()
    assert isinstance(refused, Failure) and refused.code == FailureCode.BUSY
    asker.ask(WeightsKind.HELD, name, key=b"o" * 32)
    with asker:
        keys = [asker.answers.get(timeout=10)[0].curve[:1] for _ in range(3)]
    assert b"o" in keys[:2]


def test_questions_without_length_cost_what_they_make_a_peer_do(
    held: HeldPieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, piece = bytes.fromhex(held.manifest.fingerprint), next(iter(held.piece_names))
    paced: list[int] = []
    monkeypatch.setattr(TokenBucket, "spend", lambda self, tokens, per_minute, now: paced.append(tokens) or 0.0)
    bits, looked = held.bits(), list[int]()
    monkeypatch.setattr(held, "bits", lambda: looked.append(1) or bits)
    with Asker(held) as asker:
        for kind, asked in ((WeightsKind.PIECE, piece), (WeightsKind.HELD, name), (WeightsKind.HELD, name)):
            asker.ask(kind, asked, 0, 0)
            assert len(asker.answer().payload) == 0
    size = next(size for pieces in held.manifest.parts for one, _, size in pieces.each() if one == piece)
    assert paced[0] == size + QUESTION_BYTES and len(looked) == 1


@pytest.mark.parametrize(("serving", "share"), [(False, 1.0), (True, SERVING_SHARE)])
def test_weights_come_more_slowly_while_sessions_are_served(
    held: HeldPieces, monkeypatch: pytest.MonkeyPatch, serving: bool, share: float
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(TokenBucket, "spend", lambda self, tokens, per_minute, now: rates.append(per_minute) or 0.0)
    with Asker(held, rate=1000.0, serving=lambda: serving) as asker:
        asker.ask(WeightsKind.PIECE, next(iter(held.piece_names)))
        assert isinstance(asker.answer(), WeightsPart)
    assert rates == [MINUTE_S * 1000.0 * share]


def test_bytes_per_second_are_bounded() -> None:
    spent = TokenBucket()
    assert spent.spend(100, MINUTE_S * 100.0, now=5.0) == 100.0
    assert spent.spend(100, MINUTE_S * 100.0, now=5.5) == 150.0  # what was sent too early is waited for
    assert spent.spend(100, MINUTE_S * 100.0, now=60.0) == 100.0  # and what was not used is not saved


def test_who_lets_strangers_in_shares_only_if_told_so(tmp_path: Path) -> None:
    now = [0.0]
    keys = tmp_path / "keys"
    keys.write_text(f"{Identity.generate().public.text} a friend\n")
    authorized = AuthorizedKeys(keys, clock=lambda: now[0])
    options = PeerOptions(authorized_keys=keys)
    assert options.shares_weights(authorized)
    keys.write_text(f"{keys.read_text()}anyone\n")
    now[0] = 10.0
    assert not options.shares_weights(authorized) and not PeerOptions().shares_weights(None)
    assert replace(options, share_weights=True).shares_weights(authorized)
    assert replace(options, swarm_key=SwarmKey.generate()).shares_weights(authorized)
