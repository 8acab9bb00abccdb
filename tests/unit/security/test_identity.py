from __future__ import annotations

import logging
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import KeyFileError
from splitnet.security.identity import (
    KEY_FILE_VARIABLE,
    STRANGER_WEIGHT,
    AuthorizedKeys,
    Identity,
    KeyOptions,
    PublicKey,
    without_names,
)

HANDSHAKE_TIMEOUT_MS = 5000


def test_public_key_survives_its_text() -> None:
    key = Identity.generate().public
    assert PublicKey.parse(f"  {key.text}\n") == key
    assert str(key) == key.text


@given(position=st.integers(min_value=0, max_value=58), letter=st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_one_wrong_letter_in_a_key_is_noticed(position: int, letter: str) -> None:
    text = Identity.generate().public.text
    changed = text[:position] + letter + text[position + 1 :]
    if changed != text:
        with pytest.raises(KeyFileError):
            PublicKey.parse(changed)


@given(st.text(max_size=100))
def test_parse_raises_only_key_file_error(text: str) -> None:
    with pytest.raises(KeyFileError):
        PublicKey.parse(text)


@given(st.binary(max_size=40))
def test_bytes_are_a_key_or_a_key_file_error(raw: bytes) -> None:
    try:
        key = PublicKey(raw)
    except KeyFileError:
        return
    assert len(key.curve_raw) == 32 and len(key.curve) == 40


@pytest.mark.parametrize("raw", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32, b"\x02" + bytes(31)])
def test_points_of_small_order_or_off_the_curve_are_refused(raw: bytes) -> None:
    with pytest.raises(KeyFileError):
        PublicKey(raw)


def test_signatures_hold_for_one_message_and_key() -> None:
    identity = Identity.generate()
    signature = identity.sign(b"message")
    assert identity.public.verify(b"message", signature)
    assert not identity.public.verify(b"other", signature)
    assert not identity.public.verify(b"message", signature[:-1])
    assert not Identity.generate().public.verify(b"message", signature)


def _curve_echo(client_identity: Identity, expected_server: PublicKey, server_identity: Identity) -> bytes | None:
    context = zmq.Context()
    try:
        server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        for socket in (server, client):
            socket.linger = 0
        server.curve_server = True
        server.curve_publickey, server.curve_secretkey = server_identity.curve_public, server_identity.curve_secret
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.curve_serverkey = expected_server.curve
        client.curve_publickey, client.curve_secretkey = client_identity.curve_public, client_identity.curve_secret
        monitor = client.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        client.connect(f"tcp://127.0.0.1:{port}")
        assert monitor.poll(HANDSHAKE_TIMEOUT_MS)
        event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
        client.disable_monitor()
        if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return None
        client.send(b"hello")
        assert server.poll(HANDSHAKE_TIMEOUT_MS)
        return server.recv_multipart()[1]
    finally:
        context.destroy(linger=0)


def test_curve_handshake_with_derived_keys() -> None:
    server = Identity.generate()
    assert _curve_echo(Identity.generate(), PublicKey.parse(server.public.text), server) == b"hello"


def test_curve_handshake_fails_for_another_server_key() -> None:
    assert _curve_echo(Identity.generate(), Identity.generate().public, Identity.generate()) is None


def test_key_file_is_private_and_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "key"
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(path))
    first, second = Identity.load_or_create(), Identity.load_or_create(path)
    assert first.public == second.public
    assert first.curve_secret == second.curve_secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["key"]


def test_secret_is_neither_printed_nor_pickled(tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity = Identity.load_or_create(path)
    assert repr(identity) == f"Identity({identity.public.text})"
    with pytest.raises(TypeError):
        pickle.dumps(identity)


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


@pytest.mark.parametrize("content", ["", "nonsense", "splitnet-secret-1 00ff", "splitnet-secret-1 " + "zz" * 32])
def test_damaged_key_file_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(content)
    with pytest.raises(KeyFileError, match="does not hold a splitnet key") as caught:
        Identity.load_or_create(path)
    assert caught.value.__cause__ is None
    assert path.read_text() == content


def test_key_path_that_is_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=KEY_FILE_VARIABLE):
        Identity.load_or_create(tmp_path)


def test_processes_that_create_the_file_together_share_one_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    code = (
        "import sys; from pathlib import Path; from splitnet.security.identity import Identity; sys.stdin.read(); "
        "print(Identity.load_or_create(Path(sys.argv[1])).public)"
    )
    command = [sys.executable, "-c", code, str(path)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
    keys = {worker.stdout.read() for worker in workers if worker.stdout is not None}
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0, 0, 0]
    assert keys == {f"{Identity.load_or_create(path).public}\n"}


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_authorized_keys_with_comments(tmp_path: Path) -> None:
    first, second, stranger = (Identity.generate().public for _ in range(3))
    path = tmp_path / "authorized_keys"
    text = f"\ufeff# friends\n\n{first.text} anna@laptop\n  {second.text}  # the other\n"
    path.write_text(text, encoding="utf-8")
    assert without_names(text) == [first.text, second.text]
    keys = AuthorizedKeys(path)
    assert keys.allows(first.curve_raw) and keys.allows(second.curve_raw)
    assert not keys.allows(stranger.curve_raw)
    assert not keys.allows(b"")


def test_options_stand_before_the_key_or_after_it(tmp_path: Path) -> None:
    first, second, third, stranger = (Identity.generate().public for _ in range(4))
    path = tmp_path / "authorized_keys"
    path.write_text(
        f"weight=4,kv=8GiB {first.text} anna\n"
        f"{second.text} train=no,tokens-per-minute=6000 # a guest\n"
        f"weight=0.5 {third.text} kv=1GiB\n"
        "anyone kv=64MiB\n"
    )
    keys = AuthorizedKeys(path)
    assert keys.options_of(first.curve_raw) == KeyOptions(weight=4, kv=8 * 2**30)
    assert keys.options_of(second.curve_raw) == KeyOptions(train=False, tokens_per_minute=6000)
    assert keys.options_of(third.curve_raw) == KeyOptions(weight=0.5, kv=2**30)
    assert keys.allows(stranger.curve_raw)
    assert keys.options_of(stranger.curve_raw) == KeyOptions(weight=STRANGER_WEIGHT, kv=64 * 2**20), "last of all"
    assert AuthorizedKeys(None).options_of(stranger.curve_raw) == KeyOptions(), "where nobody is listed all are equal"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("wait=4", "'wait' is not an option of a key: there are weight, kv, train, tokens-per-minute"),
        ("weight=4,weight=5", "weight is given twice"),
        ("weight=-1", "weight=-1: a weight is a number from 0.001 to 1000"),
        ("weight=nan", "weight=nan: a weight"),
        ("kv=much", "kv=much: 'much' is not an amount of memory"),
        ("kv=8", "kv=8: 8 is an amount of 8 bytes: did you mean 8GiB"),
        ("train=maybe", "train=maybe: write train=yes or train=no"),
        ("tokens-per-minute=0", "tokens-per-minute=0: write a whole number"),
        ("weight=4,", "'' is not an option of a key"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_an_unknown_option_is_refused_by_name_and_line(tmp_path: Path, options: str, reason: str, before: bool) -> None:
    key = Identity.generate().public.text
    path = tmp_path / "authorized_keys"
    path.write_text(f"# friends\n{options} {key}\n" if before else f"# friends\n{key} {options} bob\n")
    with pytest.raises(KeyFileError, match=f"line 2: {re.escape(reason)}"):
        AuthorizedKeys(path)


def test_a_line_without_a_key_and_a_key_that_is_listed_twice_are_refused(tmp_path: Path) -> None:
    key = Identity.generate().public.text
    path = tmp_path / "authorized_keys"
    for text, reason in (
        ("weight=4\n", "line 1: there are options, but no key"),
        (f"{key}\n{key} weight=2\n", "line 2"),
    ):
        path.write_text(text)
        with pytest.raises(KeyFileError, match=reason):
            AuthorizedKeys(path)


def test_anyone_is_allowed_in_a_public_swarm() -> None:
    assert AuthorizedKeys(None).allows(Identity.generate().public.curve_raw)


def test_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys"
    path.write_text(f"{Identity.generate().public.text}\n# fine\nssh-ed25519 AAAA me\n")
    with pytest.raises(KeyFileError, match="line 3: 'ssh-ed25519' is not a splitnet key"):
        AuthorizedKeys(path)


def test_missing_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        AuthorizedKeys(tmp_path / "absent")


def test_list_is_reloaded_and_a_broken_edit_keeps_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Identity.generate().public, Identity.generate().public
    path, clock = tmp_path / "authorized_keys", _Clock()
    path.write_text(first.text)
    keys = AuthorizedKeys(path, clock=clock)

    path.write_text(f"{second.text}\n")
    assert keys.allows(first.curve_raw), "the file is not looked at within the first second"
    clock.now += 1.0
    assert keys.allows(second.curve_raw) and not keys.allows(first.curve_raw)

    path.write_text("oops")
    clock.now += 1.0
    with caplog.at_level(logging.WARNING):
        assert keys.allows(second.curve_raw)
    assert "line 1" in caplog.text

    path.unlink()
    clock.now += 1.0
    assert keys.allows(second.curve_raw)


def test_an_empty_list_counts_only_at_the_second_check(tmp_path: Path) -> None:
    first, second = Identity.generate().public, Identity.generate().public
    path, clock = tmp_path / "authorized_keys", _Clock()
    path.write_text(first.text)
    keys = AuthorizedKeys(path, clock=clock)
    with path.open("w") as file:
        clock.now += 1.0
        assert keys.allows(first.curve_raw), "it is empty for a moment"
        file.write(f"{second.text}\n")
    clock.now += 1.0
    assert keys.allows(second.curve_raw) and not keys.allows(first.curve_raw)

    path.write_text("")
    clock.now += 1.0
    assert keys.allows(second.curve_raw)
    clock.now += 1.0
    assert not keys.allows(second.curve_raw), "it stays empty: nobody may use the peer"
