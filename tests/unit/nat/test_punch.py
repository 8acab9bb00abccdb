"""Ways to unreachable peers, without sockets: messages, proofs of keys, places and shares."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import NotAuthorized, ProtocolError
from splitnet.limits import ACTIVE_S, LEAST_BURST, Places, SharedRate
from splitnet.nat.punch import attempts_of
from splitnet.nat.relay_messages import (
    KINDS,
    LENGTH_BYTES,
    MAX_MESSAGE_BYTES,
    Beat,
    Call,
    Called,
    Hello,
    Join,
    Joined,
    Moved,
    Proof,
    Refused,
    Reserve,
    Reserved,
    StreamPurpose,
    Tried,
    Try,
    Welcome,
    pack,
    unpack,
)
from splitnet.nat.stream import AcceptedStream, Dialing
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import host_and_port

DIALER, LISTENER, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()
KEY, NONCE, TOKEN = bytes(range(32)), b"n" * 32, b"t" * 16
HERE, SEEN = "tcp://192.168.1.5:4000", "tcp://[2001:db8::1]:65535"
MESSAGES = [
    Hello(1, 2, KEY, NONCE),
    Welcome(KEY, NONCE, b"s" * 64),
    Proof(b"s" * 64),
    Reserve(),
    Reserved(),
    Beat(),
    Call(KEY, HERE),
    Called(TOKEN, KEY, SEEN),
    Join(TOKEN, ""),
    Joined(TOKEN, SEEN, HERE, ""),
    Refused("no"),
    Moved(1 << 62),
    Try(HERE),
    Tried(True),
]


def test_every_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(KINDS)
    assert len({kind.TAG for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_were_sent(message: Any) -> None:
    packed = pack(message)
    assert int.from_bytes(packed[:LENGTH_BYTES], "big") == len(packed) - LENGTH_BYTES <= MAX_MESSAGE_BYTES
    assert unpack(packed[LENGTH_BYTES:]) == message


@given(st.binary(max_size=MAX_MESSAGE_BYTES + 1))
def test_nonsense_is_refused(body: bytes) -> None:
    with suppress(ProtocolError):
        assert pack(unpack(body))


@given(st.sampled_from(MESSAGES), st.integers(0, 500), st.integers(1, 255))
def test_a_changed_byte_gives_a_message_or_an_error(message: Any, position: int, change: int) -> None:
    body = bytearray(pack(message)[LENGTH_BYTES:])
    body[position % len(body)] ^= change
    with suppress(ProtocolError):
        unpack(bytes(body))


@pytest.mark.parametrize("address", ["example.org:1", "tcp://example.org:1", "tcp://0.0.0.0:1", "tcp://1.2.3.4:0", 7])
def test_addresses_with_host_names_are_refused(address: Any) -> None:
    with pytest.raises(ProtocolError):
        unpack(pack(dataclasses.replace(Call(KEY, ""), here=address))[LENGTH_BYTES:])


def shaken(
    purpose: StreamPurpose = StreamPurpose.CALL, token: bytes = b"", *, theirs: bytes | None = None
) -> AcceptedStream:
    dialing = Dialing(DIALER, LISTENER.public, purpose, token)
    answering = AcceptedStream(LISTENER, dialing.hello, token if theirs is None else theirs)
    answering.check_proof(dialing.prove(answering.welcome))
    return answering


@given(st.sampled_from(StreamPurpose), st.sampled_from([b"", TOKEN]))
def test_both_sides_prove_their_keys(purpose: StreamPurpose, token: bytes) -> None:
    answering = shaken(purpose, token)
    assert answering.key == DIALER.public and answering.purpose is purpose


def test_a_handshake_belongs_to_its_call() -> None:
    with pytest.raises(NotAuthorized):
        shaken(StreamPurpose.TUNNEL, TOKEN, theirs=b"u" * 16)


def test_a_peer_with_another_key_cannot_answer() -> None:
    dialing = Dialing(DIALER, LISTENER.public, StreamPurpose.CALL)
    with pytest.raises(NotAuthorized):
        dialing.prove(AcceptedStream(STRANGER, dialing.hello).welcome)
    forged = AcceptedStream(STRANGER, dialing.hello).welcome
    with pytest.raises(NotAuthorized):
        dialing.prove(dataclasses.replace(forged, key=LISTENER.public.raw))


def test_a_key_without_its_secret_is_refused() -> None:
    dialing = Dialing(STRANGER, LISTENER.public, StreamPurpose.RESERVE)
    answering = AcceptedStream(LISTENER, dataclasses.replace(dialing.hello, key=DIALER.public.raw))
    with pytest.raises(NotAuthorized):
        answering.check_proof(Proof(STRANGER.sign(b"anything")))


def test_a_signature_for_one_relay_is_invalid_at_another() -> None:
    """A malicious relay passes on messages of a peer, to impersonate this peer at another relay."""
    dialing = Dialing(DIALER, STRANGER.public, StreamPurpose.CALL)
    elsewhere = AcceptedStream(LISTENER, dialing.hello)
    own = AcceptedStream(STRANGER, dialing.hello).welcome
    with pytest.raises(NotAuthorized):
        elsewhere.check_proof(dialing.prove(own))


@pytest.mark.parametrize("change", [{"purpose": StreamPurpose.RESERVE}, {"nonce": b"m" * 32}], ids=str)
def test_a_proof_is_invalid_for_any_other_handshake(change: dict[str, Any]) -> None:
    dialing = Dialing(DIALER, LISTENER.public, StreamPurpose.CALL)
    answering = AcceptedStream(LISTENER, dataclasses.replace(dialing.hello, **change))
    with pytest.raises(NotAuthorized):
        answering.check_proof(dialing.prove(answering.welcome))


@pytest.mark.parametrize("change", [{"version": 2}, {"purpose": 0}, {"key": bytes(32)}], ids=str)
def test_other_versions_and_nonsense_are_refused(change: dict[str, Any]) -> None:
    hello = dataclasses.replace(Dialing(DIALER, LISTENER.public, StreamPurpose.CALL).hello, **change)
    with pytest.raises(ProtocolError):
        AcceptedStream(LISTENER, hello)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_places_by_name_are_bounded(steps: list[tuple[bool, int, int]]) -> None:
    places = Places(5, key=2, host=3)
    held: list[tuple[int, int]] = []
    for takes, key, host in steps:
        if takes:
            keys, hosts = [each[0] for each in held], [each[1] for each in held]
            fits = len(held) < 5 and keys.count(key) < 2 and hosts.count(host) < 3
            assert places.take_place(key=key, host=host) is fits
            held += [(key, host)] * fits
        elif (key, host) in held:
            held.remove((key, host))
            places.leave_place(key=key, host=host)
        assert places.taken == len(held)
    for key, host in held:
        places.leave_place(key=key, host=host)
    assert not len(places) and not places.taken


def passed(shares: SharedRate, names: list[str], seconds: float, chunk: int) -> dict[str, int]:
    """The bytes that each name passes in `seconds` if all names send as fast as they may."""
    free_at, total = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    while (now := min(free_at.values())) < seconds:
        name = min(free_at, key=lambda each: free_at[each])
        total[name] += chunk
        free_at[name] = now + max(shares.delay_s(name, chunk, now), 1e-4)
    return total


@pytest.mark.parametrize("count", [1, 2, 5])
def test_active_names_share_the_rate_evenly(count: int) -> None:
    rate, seconds = 10 << 20, 20.0
    total = passed(SharedRate(rate), [str(index) for index in range(count)], seconds, 64 << 10)
    assert sum(total.values()) <= rate * seconds + count * (rate / 4 + 2 * LEAST_BURST)
    assert sum(total.values()) >= 0.9 * rate * seconds
    assert max(total.values()) <= 1.3 * min(total.values())


def test_a_silent_name_leaves_its_share_to_others() -> None:
    shares = SharedRate(1 << 20)
    for index in range(1000):
        shares.delay_s(index, 1, 0.0)
    alone = passed(SharedRate(1 << 20), ["x"], 10.0, 1 << 16)["x"]
    assert shares.delay_s("x", 0, ACTIVE_S + 0.1) == 0.0 and len(shares._buckets) == 1
    assert passed(shares, ["x"], 10.0, 1 << 16)["x"] == pytest.approx(alone, rel=0.2)


def test_addresses_behind_a_router_are_tried_only_behind_the_same() -> None:
    own, here = "tcp://192.168.1.7:5000", "tcp://192.168.1.5:4000"
    same = Joined(TOKEN, "tcp://203.0.113.1:5001", "tcp://203.0.113.1:4001", here)
    other = Joined(TOKEN, "tcp://198.51.100.1:5001", "tcp://203.0.113.1:4001", here)
    assert addresses(own, same) == [here, "tcp://203.0.113.1:4001"]
    assert addresses(own, other) == ["tcp://203.0.113.1:4001"]
    local = dataclasses.replace(other, seen="tcp://127.0.0.1:22")
    assert addresses(own, local) == [] and addresses("tcp://127.0.0.1:9", local) == ["tcp://127.0.0.1:22"]
    assert addresses(here, same) == ["tcp://203.0.113.1:4001"]


def addresses(own: str, joined: Joined) -> list[str]:
    tried = attempts_of(own, joined)
    assert all(line.source == host_and_port(own) and not line.after_s for line in tried)
    return [line.address for line in tried]


def test_ports_are_guessed_only_where_routers_keep_them() -> None:
    def guessed(own: str, you: str, seen: str, here: str) -> list[tuple[int, str]]:
        return [
            (line.source[1], line.address) for line in attempts_of(own, Joined(TOKEN, you, seen, here)) if line.after_s
        ]

    own, here, host = "tcp://192.168.1.7:5000", "tcp://192.168.1.5:4000", "tcp://203.0.113.1"
    you, other = "tcp://198.51.100.1:5000", "tcp://198.51.100.1:5007"
    both = [(5000, f"{host}:4001"), (5001, f"{host}:4000"), (5002, f"{host}:4002")]
    assert guessed(own, you, f"{host}:4000", here) == both
    assert guessed(own, you, f"{host}:4007", here) == [(5001, f"{host}:4007")]
    assert guessed(own, other, f"{host}:4000", here) == [(5000, f"{host}:4001")]
    assert guessed(own, other, f"{host}:4007", here) == []
    assert guessed(own, you, f"{host}:4000", f"{host}:4000") == [], "the other has no router"
    assert guessed(own, own, f"{host}:4000", here) == [], "this one has none"
    last = [(5001, f"{host}:65534")]
    assert guessed(own, you, f"{host}:65534", "tcp://192.168.1.5:65534") == last, "there is no port for it to guess"
