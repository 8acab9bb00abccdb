"""The options of `splitnet peer`, without a peer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never

import pytest
import torch
from typer.testing import CliRunner

from peers.peer_options import PeerOptions
from peers.running_peer import RunningPeer
from splitnet.cli import peer as command
from splitnet.cli.invite import Invite
from splitnet.cli.main import app
from splitnet.directory import hivemind_node
from splitnet.errors import SplitnetError
from splitnet.quant.choose import WeightChoice
from splitnet.quant.native import has_integer_kernels
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.transport.addresses import Reach

KEYS = [Identity.generate() for _ in range(2)]


class Reached(Exception):
    """Carries the options of the peer."""


class NoSignals:
    """Leaves the signal handlers of the test process unchanged."""

    def raise_if_stopped(self) -> None: ...


def start(checkpoint: Any, options: PeerOptions, **_: Any) -> Never:
    raise Reached(options)


@pytest.fixture(autouse=True)
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "StopSignals", NoSignals)
    monkeypatch.setattr(RunningPeer, "start", start)
    monkeypatch.delenv("SPLITNET_LAN", raising=False)


def options_of(*arguments: str) -> tuple[PeerOptions, str]:
    ran = CliRunner().invoke(app, ["peer", *arguments])
    assert isinstance(ran.exception, Reached), ran.output
    return ran.exception.args[0], ran.output


def test_the_models_that_a_peer_may_serve_are_read(tmp_path: Path) -> None:
    file = tmp_path / "models"
    file.write_text("# mine\n\n./llama  # a folder\nQwen/Qwen3-8B\n")
    assert options_of("m", "--listen", "tcp://127.0.0.1:0")[0].any_model is None
    chosen = options_of("--any-model", "--listen", "tcp://127.0.0.1:0")[0]
    assert chosen.any_model == [] and not chosen.shares_weights(None)
    chosen = options_of("m", "--any-model", "--allow", str(file), "--listen", "tcp://127.0.0.1:0")[0]
    assert chosen.any_model == ["./llama", "Qwen/Qwen3-8B"]
    for wrong, fault in {
        ("m", "--allow", str(file)): "--allow is for --any-model only",
        ("--any-model", "--blocks", "0:2"): "leave out --blocks and --model-id",
        ("--any-model", "--allow", str(tmp_path / "none")): "cannot be read",
        ("--any-model", "--allow", "/dev/null"): "names no model",
    }.items():
        ran = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["peer", *wrong])
        assert ran.exit_code and fault in f"{ran.output}{ran.exception}"


def test_a_file_of_models_is_read_and_bad_lines_are_refused(tmp_path: Path) -> None:
    file, spaced = tmp_path / "models", tmp_path / "my model"
    spaced.mkdir()
    file.write_bytes(f"\ufefforg/a\r\n/m/C#-coder\t# a folder\r\n{spaced}\n".encode())
    assert command.read_models(file) == ["org/a", "/m/C#-coder", str(spaced)]
    for line in ("*", "org/a\0b", "org/a org/b", "org/a\u2028org/b"):
        file.write_text(f"# mine\norg/a\n{line}\n", encoding="utf-8")
        with pytest.raises(SplitnetError, match="line 3: "):
            command.read_models(file)


def invitation(folder: Path, *authorized: str) -> Path:
    file = folder / "anna.invite"
    address = f"tcp://192.0.2.7:31331?key={KEYS[0].public.text}"
    Invite("m", (address,), SwarmKey.generate(), KEYS[1], authorized).save(file)
    return file


def test_an_invited_peer_authorizes_the_keys_of_its_invitation(tmp_path: Path) -> None:
    file = invitation(tmp_path, KEYS[0].public.text, KEYS[1].public.text)
    options, said = options_of("--invite", str(file))
    assert options.authorized_keys == tmp_path / "anna.invite.keys"
    assert "lists clients with priority" in said and "anyone who knows" not in said
    assert options.invited and not options_of("m", "--invite", str(file))[0].invited
    own = tmp_path / "own"
    assert options_of("--invite", str(file), "--authorized-keys", str(own))[0].authorized_keys == own


def test_a_warning_names_an_invitation_without_keys(tmp_path: Path) -> None:
    options, said = options_of("--invite", str(invitation(tmp_path)))
    assert options.authorized_keys is None
    assert "anyone who knows this peer's address may use the peer" in said


def test_a_peer_without_hivemind_warns_that_others_cannot_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options_of("m")[0].lan
    monkeypatch.setattr(hivemind_node, "have_hivemind", lambda: False)
    options, said = options_of("m")
    assert not options.lan and "others cannot find this peer" in said
    options, said = options_of("m", "--listen", "tcp://127.0.0.1:0")
    assert not options.lan and "hivemind" not in said


def test_a_peer_in_a_private_network_prints_addresses_for_others() -> None:
    private, key = "tcp://192.168.1.5:31331", "?key=x"
    node = "/ip4/203.0.113.7/tcp/31330/p2p/Qm"
    known = [
        f"tcp://10.0.0.9:31331{key}",
        f"tcp://198.18.0.1:1{key}",
        f"tcp://8.8.8.8:31331{key}",
        "/ip6/2600::1/tcp/1",
    ]

    def told(address: str, *joined: str, reach: Reach = Reach.auto) -> str | None:
        return command.join_advice(address, joined, reach)

    assert told("tcp://8.8.8.8:31331") is None and told("tcp://127.0.0.1:31331") is None
    assert told(private, *known) == f"machines in other networks join with\n  --join {known[2]}\n  --join {known[3]}"
    for joined in ((), known[:1], [node]):
        said = told(private, *joined)
        assert said is not None and "other networks cannot reach these addresses: --join a peer that they" in said
    assert "--join" in (told("tcp://8.8.8.8:31331", reach=Reach.helpers) or ""), "nobody connects to its own address"


def test_a_share_rate_without_shared_files_is_refused(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["peer", "m", "--share-rate", "1MiB"])
    assert ran.exit_code == 2 and "--share-rate needs --share-weights" in ran.output
    for also in (["--share-weights"], ["--authorized-keys", str(tmp_path / "keys")]):
        assert options_of("m", "--share-rate", "1MiB", *also)[0].share_rate == 1 << 20


@pytest.mark.skipif(not has_integer_kernels(), reason="int8 may not be faster here")
@pytest.mark.parametrize(
    ("weights", "serves", "others"),
    [
        (
            WeightChoice("float16", torch.float32),
            "(float32 with weights as float16 on cpu)",
            "--weights float32 is slower, but exact",
        ),
        (
            WeightChoice("bfloat16", torch.float32, exact=True),
            "(float32 with weights exactly as bfloat16 on",
            "--weights int8 is faster",
        ),
        (WeightChoice("bfloat16", torch.bfloat16), "(bfloat16 on cpu)", "--weights int8 is faster, but less exact"),
        (WeightChoice("stored", torch.float32), "(float32 with weights as stored on cpu)", None),
    ],
)
def test_the_start_names_the_weight_format_and_alternatives(
    weights: WeightChoice, serves: str, others: str | None
) -> None:
    span = SimpleNamespace(start=0, end=2, dtype=weights.dtype, weights=weights, device=torch.device("cpu"), kv="auto")
    peer: Any = SimpleNamespace(
        span=span, checkpoint=SimpleNamespace(name="m"), endpoint=SimpleNamespace(address="tcp://127.0.0.1:1")
    )
    assert serves in command._what_it_serves(peer)
    told = command._other_weights(peer)
    assert told is None if others is None else told is not None and others in told
