"""The swarm key: a process without it can name no model, read no record and write no record."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from splitnet.cli.connection import ModelConnection
from splitnet.cli.invite import Invite
from splitnet.cli.main import app
from splitnet.directory.joining import join
from splitnet.errors import DirectoryError, KeyFileError, NotAuthorized, SplitnetError
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import OPEN, SEAL_BYTES, SwarmKey
from splitnet.session.options import ConnectionOptions
from splitnet.tools.bench.backends import Benchmark
from splitnet.wire.messages import FINGERPRINT

KEY, OTHER = SwarmKey.generate(), SwarmKey.generate()


@given(st.binary(max_size=200))
def test_only_members_can_unseal(data: bytes) -> None:
    sealed = KEY.seal(data)
    assert KEY.unseal(sealed) == KEY.unseal(memoryview(sealed)) == data
    assert len(sealed) == len(data) + SEAL_BYTES
    assert KEY.seal(data) != sealed
    with pytest.raises(NotAuthorized):
        OTHER.unseal(sealed)
    assert OPEN.unseal(OPEN.seal(data)) == data


@given(st.binary(max_size=100), st.data())
def test_sealed_bytes_cannot_be_changed_or_made_without_the_key(data: bytes, draws: st.DataObject) -> None:
    sealed = bytearray(KEY.seal(data))
    sealed[draws.draw(st.integers(0, len(sealed) - 1))] ^= draws.draw(st.integers(1, 255))
    for wrong in (bytes(sealed), data, sealed[: draws.draw(st.integers(0, len(sealed) - 1))]):
        with pytest.raises(NotAuthorized):
            KEY.unseal(bytes(wrong))


def test_a_place_reveals_no_model_without_the_key() -> None:
    model = "ab" * 32
    assert FINGERPRINT.fullmatch(KEY.place(model))
    assert len({KEY.place(model), OTHER.place(model), KEY.place(""), model}) == 4
    assert OPEN.place(model) == model


def test_a_key_file_is_created_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "swarm.key"
    key = SwarmKey.create(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SwarmKey.load(file).place("") == key.place("")
    with pytest.raises(KeyFileError, match="exists already"):
        SwarmKey.create(file)
    file.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        SwarmKey.load(file)


@pytest.mark.parametrize(
    "text", ["", "splitnet-swarm-1 ab", "splitnet-secret-1 " + "ab" * 32, "splitnet-swarm-1 " + "x" * 64]
)
def test_an_invalid_key_is_refused_and_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "swarm.key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(KeyFileError) as refused:
        SwarmKey.load(file)
    assert "ab" * 8 not in str(refused.value) and "x" * 8 not in str(refused.value)


def test_a_key_is_neither_printed_nor_pickled() -> None:
    assert KEY.secret_text.split()[1] not in repr(KEY)
    with pytest.raises(TypeError):
        pickle.dumps(KEY)


def test_an_invitation_comes_back_from_its_file(tmp_path: Path) -> None:
    file, identity = tmp_path / "anna.invite", Identity.generate()
    address = f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}"
    Invite(r"a\model", (address, address), KEY, identity).save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    read = Invite.load(file)
    assert (read.model, read.join, read.identity.public) == (r"a\model", (address, address), identity.public)
    assert read.swarm_key.place("") == KEY.place("")


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("model = 'm'", "", "is not an invitation: ask for the file"),
        ("model = 'm'", "model = 7", "is not an invitation: ask for the file"),
        ("splitnet-swarm-1", "splitnet-swarm-2", "is not an invitation: this is not a swarm key"),
        ("splitnet-secret-1", "splitnet", "is not an invitation: this is not a secret key"),
        ("join = [", "join = [7, ", "is not an invitation: ask for the file"),
        ("authorized = [", "authorized = [7, ", "is not an invitation: ask for the file"),
        ("?key=", "?", "is not the address of a peer"),
        ("# An", "An", "is not an invitation: ask for the file"),
        ("# An", "a = " + "[" * 100_000, "is not an invitation: ask for the file"),
    ],
)
def test_an_invalid_invitation_is_refused(before: str, after: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "anna.invite"
    Invite("m", (f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}",), KEY, Identity.generate()).save(file)
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    with pytest.raises((KeyFileError, DirectoryError), match=error):
        Invite.load(file)


def invited(folder: Path, keys: str, *more: str) -> tuple[Path, Path]:
    """The files of an invitation and of the list that it extends."""
    swarm_key, file, listed = folder / "swarm.key", folder / "anna.invite", folder / "keys"
    SwarmKey.create(swarm_key)
    listed.write_text(keys)
    files = ["--swarm-key", str(swarm_key), "--authorized-keys", str(listed), "--output", str(file)]
    done = CliRunner().invoke(app, ["invite", "m", *files, "--name", "anna", *more], catch_exceptions=False)
    assert done.exit_code == 0
    return file, listed


def test_an_invitation_names_the_keys_that_may_use_peers_of_the_invited_machine(tmp_path: Path) -> None:
    owner, peer, other = (Identity.generate().public for _ in range(3))
    join = ["--join", f"tcp://192.0.2.7:31331?key={peer.text}", "--join", f"tcp://192.0.2.8:31331?key={owner.text}"]
    keys = f"# ours\nkv=8GiB {owner.text} me\n{other.text} weight=2 a guest # of mine"
    file, listed = invited(tmp_path, keys, *join)
    invitation = Invite.load(file)
    anna = invitation.identity.public
    expected = [f"kv=8GiB {owner.text}", f"{other.text} weight=2", anna.text, peer.text]
    assert list(invitation.authorized) == expected
    assert listed.read_text() == f"{keys}\n{anna.text} anna\n"
    mine = tmp_path / "anna.invite.keys"
    assert invitation.list_of_keys(file) == mine and mine.read_text().splitlines()[:-1] == expected
    shares = AuthorizedKeys(mine)
    assert [shares.options_of(key.curve_raw).weight for key in (owner, other, anna, peer)] == [1, 2, 1, 1]
    later = Identity.generate().public.curve_raw
    assert shares.allows(later) and shares.options_of(later).weight < 1
    mine.write_text("".join(f"{line}\n" for line in expected))
    assert not AuthorizedKeys(mine).allows(later)
    mine.write_text(f"{anna.text}\n")
    assert invitation.list_of_keys(file) == mine and mine.read_text() == f"{anna.text}\n", "it is the user's now"


def test_an_invitation_of_an_earlier_version_names_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "anna.invite"
    Invite("m", (f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}",), KEY, Identity.generate()).save(file)
    file.write_text(file.read_text().replace("authorized = []\n", ""))
    assert Invite.load(file).list_of_keys(file) is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_list_that_cannot_be_read_leaves_all_files_unchanged(tmp_path: Path) -> None:
    file, listed = invited(tmp_path, "", "--join", f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}")
    text = file.read_bytes()
    listed.write_bytes(b"\xff")
    files = ["--swarm-key", str(tmp_path / "swarm.key"), "--authorized-keys", str(listed), "--output", str(file)]
    join = ["--join", f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}"]
    done = CliRunner().invoke(app, ["invite", "m", *files, *join])
    assert isinstance(done.exception, SplitnetError) and "cannot be extended" in str(done.exception)
    assert file.read_bytes() == text


@pytest.mark.parametrize("command", ["peer", "generate", "chat", "serve", "tune", "status", "doctor", "bench"])
def test_an_invitation_beside_another_swarm_key_or_key_is_refused_by_name(command: str, tmp_path: Path) -> None:
    file, key, data = tmp_path / "anna.invite", str(tmp_path / "key"), tmp_path / "data.jsonl"
    Invite("m", (f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}",), KEY, Identity.generate()).save(file)
    data.write_text('{"text": "a"}\n')
    more = {"generate": ["hello"], "tune": ["--data", str(data), "--output", str(tmp_path / "out")]}.get(command, [])
    for option in ("--swarm-key", "--key-file"):
        done = CliRunner().invoke(app, [command, *more, "--invite", str(file), option, key])
        assert isinstance(done.exception, SplitnetError) and f"leave out {option}" in str(done.exception)


def test_bench_measures_the_swarm_of_an_invitation_beside_the_model_here(tmp_path: Path) -> None:
    benchmark = Benchmark((), 1, 0, 0, None, local=True)
    assert benchmark._measures_swarm(ModelConnection("m", ConnectionOptions(invite=tmp_path / "anna.invite")))
    assert benchmark._measures_swarm(ModelConnection("m", ConnectionOptions(initial_peers=["tcp://..."])))
    assert not benchmark._measures_swarm(ModelConnection("m", ConnectionOptions()))


def test_a_closed_swarm_joins_no_dht() -> None:
    def no_links() -> None:
        raise AssertionError("nobody is asked")

    with pytest.raises(DirectoryError, match="a closed swarm has no DHT"):
        join(["/ip4/127.0.0.1/tcp/9/p2p/12D3KooW"], no_links, swarm=KEY)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DirectoryError, match="a closed swarm is joined through a peer"):
        join([], no_links, swarm=KEY)  # pyright: ignore[reportArgumentType]
