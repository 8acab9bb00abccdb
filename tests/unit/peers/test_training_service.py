"""What a peer answers to messages of training, and what it keeps, without sockets and without a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peers.sessions import MESSAGE_BYTES, MOST_RESENT, RESEND_S, PassWork
from splitnet.wire.endpoints import Connection, Destination, LinkState
from splitnet.wire.messages import (
    Adapter,
    AdapterGradient,
    AdapterLoaded,
    Close,
    FailureCode,
    FetchedKV,
    FetchKV,
    Forward,
    Gradient,
    Ping,
    Pong,
    Result,
)
from tests.unit.peers.test_service import (
    AFTER,
    CLIENT,
    HIDDEN,
    OTHER,
    PLAIN,
    PREVIOUS,
    SID,
    STRANGER,
    FakeRow,
    Peer,
    code_of,
    is_opened,
    opening,
    to_client,
)

PAYLOAD = bytes(3 * 4 * HIDDEN)
ADAPTER: Any = object()

BYTES = len(PAYLOAD) + MESSAGE_BYTES
"""Of a pass of three positions."""

ADAPTER_BYTES = 2 * len(b"tensors") + MESSAGE_BYTES
"""Of an adapter and the sum of its gradients."""


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def opened(peer: Peer) -> Peer:
    """With a session whose next hop is up."""
    peer.outbox.states[AFTER] = LinkState.UP
    assert is_opened(peer.says(opening()), reachable=True)
    return peer


def forward(number: int = 7, **changes: Any) -> Forward:
    message = Forward(SID, 1, number, 0, (2, 1), True, 0, PLAIN.code, PLAIN.code, PAYLOAD, 2)
    return replace(message, **changes)


def gradient(number: int = 7, **changes: Any) -> Gradient:
    return replace(Gradient(SID, 1, number, 6, number, False, PLAIN.code, PAYLOAD), **changes)


def adapter(version: int = 1, remaining: int = 0, session: bytes = SID) -> Adapter:
    return Adapter(session, 1, version, remaining, b"tensors")


def kept_bytes(peer: Peer) -> int:
    return peer.service.training_memory.used


def take(peer: Peer) -> PassWork:
    """The engine takes the next pass."""
    work = peer.queue.take_pass()
    assert work is not None
    return work


def ends(peer: Peer, work: PassWork, *parts: bytes) -> list[tuple[Destination, Any]]:
    """The engine has computed it."""
    if isinstance(work.message, Forward):
        peer.service.training.forwarded(work, b"output")
    elif isinstance(work.message, Gradient):
        peer.service.training.backward_done(work, b"gradient", list(parts))
    elif isinstance(work.message, FetchKV):
        peer.service.training.fetched_kv(work, list(parts))
    else:
        peer.service.training.adapter_loaded(work, ADAPTER)
    peer.queue.release_pass(work)
    return peer.heard()


def goes_forward(peer: Peer, message: Forward, source: Connection = PREVIOUS) -> list[tuple[Destination, Any]]:
    assert peer.says(message, source) == []
    return ends(peer, take(peer))


def test_a_pass_is_pushed_on_and_its_gradient_goes_back_the_same_way(opened: Peer) -> None:
    [(destination, pushed)] = goes_forward(opened, forward())
    assert destination == AFTER
    assert (pushed.payload, pushed.boundary, pushed.lengths, pushed.number) == (b"output", 6, (2, 1), 7)
    assert len(pushed.timings) == 1
    assert kept_bytes(opened) == BYTES
    assert opened.says(gradient(), AFTER) == []
    work = take(opened)
    work.compute_ms = 3.0
    sent = ends(opened, work, b"first", b"second")
    assert sent[:2] == [
        (CLIENT, AdapterGradient(SID, 1, 7, 1, b"first")),
        (CLIENT, AdapterGradient(SID, 1, 7, 0, b"second")),
    ]
    [(destination, back)] = sent[2:]
    assert [timing.compute_us for timing in back.timings] == [3000]
    assert (destination, replace(back, timings=())) == (
        PREVIOUS,
        Gradient(SID, 1, 7, 2, 7, False, PLAIN.code, b"gradient"),
    )
    assert kept_bytes(opened) == 0


def test_the_last_hop_answers_the_client(peer: Peer) -> None:
    peer.says(to_client())
    [(destination, result)] = goes_forward(peer, forward(), CLIENT)
    assert destination == CLIENT
    assert isinstance(result, Result) and (result.end, result.payload) == (6, b"output")


def test_nothing_is_kept_of_a_pass_without_a_way_back(opened: Peer) -> None:
    goes_forward(opened, forward(kept=False))
    assert kept_bytes(opened) == 0
    assert code_of(opened.says(gradient(), AFTER)) == FailureCode.OUT_OF_ORDER


def test_a_gradient_goes_back_once(opened: Peer) -> None:
    goes_forward(opened, forward())
    assert opened.says(gradient(), AFTER) == []
    assert code_of(opened.says(gradient(), AFTER)) == FailureCode.OUT_OF_ORDER


@pytest.mark.parametrize("source", [STRANGER, PREVIOUS], ids=["stranger", "previous"])
@pytest.mark.parametrize("message", [gradient(), adapter()], ids=type)
def test_only_the_owner_sends_adapters_and_gradients_from_below(message: Any, source: Connection, opened: Peer) -> None:
    goes_forward(opened, forward())
    assert code_of(opened.says(message, source), source) == FailureCode.UNKNOWN_SESSION
    assert opened.queue.take_pass() is None


def test_strangers_send_no_passes(opened: Peer) -> None:
    assert code_of(opened.says(forward(), STRANGER), STRANGER) == FailureCode.UNKNOWN_SESSION


def test_gradients_come_from_the_next_hop_alone(opened: Peer) -> None:
    goes_forward(opened, forward())
    assert opened.says(gradient(), OTHER) == []
    assert opened.queue.take_pass() is None


@pytest.mark.parametrize(
    ("message", "source", "code"),
    [
        (forward(boundary=3), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(lengths=()), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(lengths=(3, 0)), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(lengths=(4,)), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(codec=200), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(gradient_codec=200), PREVIOUS, FailureCode.BAD_MESSAGE),
        (forward(lengths=(4097,), payload=b""), PREVIOUS, FailureCode.TOO_LONG),
        (forward(lengths=(4000, 4000), payload=b""), PREVIOUS, FailureCode.TOO_LONG),
        (gradient(boundary=5), AFTER, FailureCode.BAD_MESSAGE),
        (gradient(payload=b"short"), AFTER, FailureCode.BAD_MESSAGE),
        (gradient(number=8), AFTER, FailureCode.OUT_OF_ORDER),
    ],
)
def test_what_does_not_fit_is_refused(message: Any, source: Destination, code: FailureCode, opened: Peer) -> None:
    goes_forward(opened, forward())
    assert code_of(opened.says(message, source)) == code
    assert opened.queue.take_pass() is None


def test_messages_of_another_epoch_are_dropped(opened: Peer) -> None:
    goes_forward(opened, forward())
    for message, source in ((forward(epoch=2), PREVIOUS), (gradient(epoch=2), AFTER), (gradient(epoch=0), AFTER)):
        assert opened.says(message, source) == []
    assert opened.queue.take_pass() is None


def test_what_the_client_does_not_need_is_dropped(opened: Peer) -> None:
    for number in (7, 8, 9):
        goes_forward(opened, forward(number))
    assert kept_bytes(opened) == 3 * BYTES
    goes_forward(opened, forward(10, oldest=9))
    assert sorted(opened.session().training_state.kept) == [9, 10]
    assert kept_bytes(opened) == 2 * BYTES


def test_keys_and_values_go_to_the_owner_in_parts(opened: Peer) -> None:
    recall = FetchKV(SID, 1, 9, row=3, length=5)
    assert code_of(opened.says(recall, PREVIOUS), PREVIOUS) == FailureCode.UNKNOWN_SESSION
    assert opened.says(recall, CLIENT) == []
    assert ends(opened, take(opened), b"one", b"two") == [
        (CLIENT, FetchedKV(SID, 1, 9, 1, b"one")),
        (CLIENT, FetchedKV(SID, 1, 9, 0, b"two")),
    ]
    assert kept_bytes(opened) == 0


def test_a_newer_epoch_forgets_passes_and_keeps_the_adapter(opened: Peer) -> None:
    opened.says(adapter())
    assert ends(opened, take(opened)) == [(CLIENT, AdapterLoaded(SID, 1, 1))]
    goes_forward(opened, forward())
    assert opened.says(forward(8), PREVIOUS) == []
    running = take(opened)
    assert opened.says(forward(9), PREVIOUS) == []
    opened.says(opening(epoch=2))
    assert opened.queue.take_pass() is None
    assert ends(opened, running) == []
    assert kept_bytes(opened) == ADAPTER_BYTES


def test_a_session_that_ends_frees_everything(opened: Peer) -> None:
    opened.says(adapter())
    ends(opened, take(opened))
    goes_forward(opened, forward())
    opened.says(forward(8), PREVIOUS)
    running = take(opened)
    opened.says(forward(9), PREVIOUS)
    opened.says(adapter(2, remaining=1))
    opened.says(Close(SID))
    assert ends(opened, running) == []
    assert kept_bytes(opened) == 0
    assert opened.queue.pass_positions == 0


def test_memory_is_bounded(opened: Peer) -> None:
    memory = opened.service.training_memory
    memory.limit = 2 * (2 * BYTES + ADAPTER_BYTES)  # one key gets half
    goes_forward(opened, forward(7))
    goes_forward(opened, forward(8))
    assert opened.says(adapter()) == []
    assert code_of(opened.says(adapter(2))) == FailureCode.BUSY
    assert code_of(opened.says(forward(9), PREVIOUS)) == FailureCode.BUSY
    goes_forward(opened, forward(10, oldest=9))


def test_one_key_leaves_memory_for_others(opened: Peer) -> None:
    memory = opened.service.training_memory
    memory.limit = 16 * BYTES + 2 * ADAPTER_BYTES
    number = 7
    while not opened.says(forward(number), PREVIOUS):
        ends(opened, take(opened))
        number += 1
    version = 1
    while not opened.says(adapter(version)):
        ends(opened, take(opened))
        version += 1
    theirs = bytes(16)
    opened.says(opening(session=theirs), STRANGER)
    assert opened.says(adapter(session=theirs), STRANGER) == []
    ends(opened, take(opened))
    goes_forward(opened, forward(session=theirs), STRANGER)
    assert opened.says(gradient(session=theirs), AFTER) == []


def test_a_newer_adapter_takes_the_place_of_the_older(opened: Peer) -> None:
    for version in (1, 2, 3):
        opened.says(adapter(version, remaining=1))
        assert opened.queue.take_pass() is None
        opened.says(adapter(version))
        assert ends(opened, take(opened)) == [(CLIENT, AdapterLoaded(SID, 1, version))]
        assert kept_bytes(opened) == 2 * ADAPTER_BYTES


def test_a_part_that_does_not_go_on_begins_anew(opened: Peer) -> None:
    for message in (adapter(1, remaining=3), adapter(1, remaining=3), adapter(1, remaining=1), adapter(2, remaining=1)):
        assert opened.says(message) == []
        assert kept_bytes(opened) == ADAPTER_BYTES
    opened.says(adapter(2))
    work = take(opened)
    assert [(part.version, part.remaining) for part in work.parts] == [(2, 1), (2, 0)]
    assert ends(opened, work) == [(CLIENT, AdapterLoaded(SID, 1, 2))]


def test_empty_parts_are_refused(opened: Peer) -> None:
    assert code_of(opened.says(replace(adapter(1, remaining=1), payload=b""))) == FailureCode.BAD_MESSAGE
    assert kept_bytes(opened) == 0


def test_adapters_that_follow_each_other_at_once_are_taken_over_one_by_one(opened: Peer) -> None:
    for version in (1, 2, 2):
        opened.says(adapter(version))
    assert kept_bytes(opened) == 3 * ADAPTER_BYTES
    for version in (1, 2, 2):
        work = take(opened)
        assert [part.version for part in work.parts] == [version]
        assert ends(opened, work) == [(CLIENT, AdapterLoaded(SID, 1, version))]
    assert kept_bytes(opened) == ADAPTER_BYTES


def test_what_waits_is_counted_with_its_objects(opened: Peer) -> None:
    memory = opened.service.training_memory
    memory.limit = 10 * MESSAGE_BYTES
    tiny = forward(lengths=(1,), payload=bytes(4 * HIDDEN))
    answers = [opened.says(replace(tiny, number=number), PREVIOUS) for number in range(1, 100)]
    assert sum(not answer for answer in answers) < 10
    assert code_of(answers[-1]) == FailureCode.BUSY


def test_keys_and_values_are_not_sent_again_and_again(opened: Peer) -> None:
    opened.session().row_state.caches[3] = FakeRow(5)  # type: ignore[assignment]
    asked = FetchKV(SID, 1, 9, row=3, length=5)
    for _ in range(MOST_RESENT):
        assert opened.says(asked, CLIENT) == []
        ends(opened, take(opened), b"one")
    assert code_of(opened.says(asked, CLIENT)) == FailureCode.BUSY
    opened.now += RESEND_S
    assert opened.says(asked, CLIENT) == []


def test_a_device_that_fails_is_told_and_nothing_is_kept(opened: Peer) -> None:
    opened.says(forward(), PREVIOUS)
    opened.service.training.report_failure(take(opened), FailureCode.INTERNAL, "a bug")
    assert code_of(opened.heard()) == FailureCode.INTERNAL
    assert kept_bytes(opened) == 0


def test_a_peer_that_only_trains_is_busy(opened: Peer) -> None:
    opened.service.ms_per_position = 2.0
    opened.says(forward(), PREVIOUS)
    [(_, pong)] = opened.says(Ping(1))
    assert isinstance(pong, Pong) and pong.queue_ms == 6.0
    assert opened.service.queue.queued_positions == 0


WAY: Any = object()


def keeps_way(peer: Peer, number: int, nbytes: int, **changes: Any) -> PassWork | None:
    """A pass goes forward; the engine keeps its way back if it may."""
    assert peer.says(forward(number, **changes), PREVIOUS) == []
    work, training = take(peer), peer.service.training
    may = training.reserve_graph(work, nbytes)
    if may:
        training.keep_graph(work, WAY)
    ends(peer, work)
    return work if may else None


def test_a_way_back_that_is_kept_is_accounted_for_until_the_gradient_has_gone_back(opened: Peer) -> None:
    kept = keeps_way(opened, 7, 1000)
    assert kept is not None and kept_bytes(opened) == BYTES + 1000
    assert opened.says(gradient(), AFTER) == []
    work = take(opened)
    assert work.forward is kept
    assert opened.service.training.take_graph(kept) is WAY
    assert opened.service.training.take_graph(kept) is None
    ends(opened, work)
    assert kept_bytes(opened) == 0


def test_ways_back_make_room_for_what_cannot_be_computed_again(opened: Peer) -> None:
    memory = opened.service.training_memory
    memory.limit = 20 * BYTES
    first, second = (keeps_way(opened, number, 2 * BYTES) for number in (7, 8))
    assert first is not None and second is not None
    assert keeps_way(opened, 9, 5 * BYTES) is None  # it would leave too little
    for number in (10, 11, 12, 13, 14):
        goes_forward(opened, forward(number))
    assert first.graph is None and second.graph is WAY
    for number in (15, 16):
        goes_forward(opened, forward(number))
    assert second.graph is None
    assert kept_bytes(opened) == 10 * BYTES
    memory.limit = 40 * BYTES
    assert opened.says(gradient(7), AFTER) == []  # its input is still there


def test_ways_back_end_with_their_passes(opened: Peer) -> None:
    """With those that the client does not need any more, with an epoch, and with a session."""
    keeps_way(opened, 7, 1000)
    keeps_way(opened, 8, 1000, oldest=8)
    assert kept_bytes(opened) == BYTES + 1000
    opened.says(opening(epoch=2))
    assert kept_bytes(opened) == 0
    kept = keeps_way(opened, 9, 1000, epoch=2)
    assert kept is not None and kept.graph is WAY
    opened.says(Close(SID))
    assert kept.graph is None and kept_bytes(opened) == 0


def test_a_way_back_of_a_session_that_has_ended_is_not_kept(opened: Peer) -> None:
    opened.says(forward(), PREVIOUS)
    work, training = take(opened), opened.service.training
    assert training.reserve_graph(work, 1000)
    opened.says(Close(SID))
    training.keep_graph(work, WAY)
    assert work.graph is None
    assert not training.reserve_graph(work, 1000)
    ends(opened, work)
    assert kept_bytes(opened) == 0


def test_a_pass_that_fails_keeps_no_way_back(opened: Peer) -> None:
    kept = keeps_way(opened, 7, 1000)
    assert kept is not None
    opened.says(gradient(), AFTER)
    work = take(opened)
    opened.service.training.report_failure(work, FailureCode.INTERNAL, "broken")
    assert kept_bytes(opened) == 0 and kept.graph is None
