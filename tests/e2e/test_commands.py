"""Every command, run like a user runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.main import get_command

import splitnet
from peers.peer_options import PeerOptions, SpanWish
from peers.running_peer import RunningPeer
from splitnet.audit.auditor import evidence_folder
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.main import app
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.swarm import peer_cache
from tests.e2e.conftest import DUO_SPANS, SPANS, Here
from tests.e2e.daemons import LOOPBACK, Daemon, daemon, run, starting
from tests.e2e.small_model import small_model
from tests.swarm.harness import local_swarm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMANDS = [
    "run",
    "peer",
    "generate",
    "chat",
    "serve",
    "tune",
    "status",
    "models",
    "doctor",
    "bench",
    "dht",
    "key",
    "invite",
    "demo",
]
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"
NO_PEER = f"tcp://127.0.0.1:9?key={Identity.generate().public.text}"
KV = ("--kv-memory", "64MiB")


@pytest.fixture(scope="module")
def fine_tuned(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return small_model(tmp_path_factory.mktemp("fine-tuned"), demo_checkpoint, seed=1)


@pytest.fixture(scope="module")
def holed(small: Path) -> Iterator[str]:
    """The address of a swarm that lacks blocks 4 and 5."""
    with local_swarm(small, [(0, 4)]) as swarm:
        yield swarm.addresses[0]


@pytest.fixture(scope="module")
def private(small: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a swarm of one peer that accepts only the user's key, as `splitnet key` prints it."""
    keys = tmp_path_factory.mktemp("private") / "keys"
    shown = run(home, "key")
    assert shown.code == 0
    keys.write_text(f"# friends\n{shown.output.strip()} a comment\n")
    with local_swarm(small, [(0, 6)], authorized_keys=keys) as swarm:
        yield swarm.addresses[0]


EVERY_HELP = """
import json, sys
from typer.testing import CliRunner
from splitnet.cli.main import app

shown = [CliRunner().invoke(app, [command, "--help"]) for command in sys.argv[1:]]
print(json.dumps([[[each.exit_code, each.stdout, each.stderr] for each in shown], list(sys.modules)]))
"""
MOST_MODULES = 900
"""Number of modules that help may import: it was 620 when this was written; torch alone has 1,000, and takes
seconds."""


def test_help_is_fast(home: Path) -> None:
    shown = run(home, "--help")
    assert shown.code == 0 and "--help" in shown.output and not shown.errors
    assert all(command in shown.output for command in COMMANDS)
    ended = subprocess.run([sys.executable, "-c", EVERY_HELP, *COMMANDS], capture_output=True, text=True, check=True)
    helps, imported = json.loads(ended.stdout)
    for code, output, errors in helps:
        assert code == 0 and "--help" in output and not errors
    assert len(helps) == len(COMMANDS)
    assert len(imported) < MOST_MODULES and not {"hivemind", "torch", "transformers"} & {*imported}


def test_version(here: Here) -> None:
    assert here("--version").output == f"splitnet {splitnet.__version__}\n"


TUNE = "tune {small} --join {nobody} --output {home}/adapter --data"
FAILURES: dict[str, tuple[str, str]] = {
    # name: (arguments, expected sentence); {words} are filled in
    "no such folder": ("peer /no/such/folder", "there is no folder /no/such/folder: give"),
    "a file that is not a checkpoint": (
        "peer {good}",
        "good is a file that is not a checkpoint: give a GGUF file, whose name",
    ),
    "several GGUF files": ("peer {ggufs}", "ggufs holds 2 GGUF files: give one of them, such as .*/ggufs/a.gguf"),
    "blocks that are not there": ("peer {small} --blocks 4:9", "has blocks 0..5: use --blocks"),
    "blocks written wrongly": ("peer {small} --blocks 4-9", "'4-9' is not a range of blocks: write START:END"),
    "memory without a unit": (
        "peer {small} --memory 4",
        r"4 is an amount of 4 bytes: did you mean 4GiB\? Write the unit",
    ),
    "memory written wrongly": ("peer {small} --memory lots", "'lots' is not an amount of memory: write it as 4GiB"),
    "too little memory": ("peer {small} --memory 1KiB", "one block of .* takes .*: use --memory with more"),
    "port taken": ("peer {small} --listen {taken}", "{taken} is taken: choose another port"),
    "DHT port taken": ("peer {small} --dht-listen {taken_dht}", "{taken_dht} is taken; choose another port"),
    "not this machine": ("peer {small} --listen tcp://203.0.113.5:0", "cannot listen on .*: give an address of this"),
    "no power of a device": ("peer {small} --watts 0", "--watts 0 is not a valid power: give more than 0"),
    "client: no slowdown": (
        "generate {small} hi --join {nobody} --prefer energy --energy-slowdown 0.5",
        "an energy slowdown is a number from 1, not 0.5",
    ),
    "client: a slowdown alone": (
        "bench {small} --join {nobody} --energy-slowdown 2",
        "an energy slowdown needs the preference energy, not latency: ask for both",
    ),
    "no address to listen on": ("peer {small} --listen 31331", "'31331' is not an address to listen on: write tcp://"),
    "no such device": ("peer {small} --device warp", "there is no device 'warp': use --device auto, cpu, cuda, cuda:1"),
    "a device that is not here": (
        "peer {small} --device cuda:99",
        "has no device 'cuda:99' .*: use --device auto or cpu",
    ),
    "client: a device that is not here": (
        "generate {small} hi --device xpu:99",
        "no device 'xpu:99' .*: use --device auto",
    ),
    "weights wider than what is computed": (
        "peer {small} --weights float32 --dtype bfloat16",
        "compute in bfloat16 cannot hold weights as float32: leave --dtype out, or use --weights bfloat16",
    ),
    "no list of keys": ("peer {small} --authorized-keys /no/keys", "authorized keys in /no/keys cannot be read"),
    "no address to join": ("peer {small} --join 127.0.0.1:80", "'127.0.0.1:80' is not an address to join with: copy"),
    "nobody to join": ("peer {small} --join {nobody}", "No peer answers at {nobody}: check that it runs"),
    "client: nobody to join": ("generate {small} hi --join {nobody}", "No peer answers at {nobody}: check that it"),
    "client: no peer to join through": (
        "generate {small} hi --join {no_peer}",
        "No peer answers with records: {no_peer_text} is not reached: check that it runs and that its port is open",
    ),
    "client: an address without a key": (
        "generate {small} hi --join tcp://127.0.0.1:80",
        "'tcp://127.0.0.1:80' is not the address of a peer: copy the whole address",
    ),
    "dht: no node to join through": (
        "dht --listen /ip4/127.0.0.1/tcp/0 --key-file {home}/dht --join {no_peer}",
        "is not the address of a node of the DHT",
    ),
    "client: no swarm": ("generate {small} hi", "no swarm is given: give --join with the address .* with --lan"),
    "status: no swarm": ("status {small}", "no swarm is given: give --join with the address .* with --lan"),
    "dht: nobody to join": (
        "dht --listen /ip4/127.0.0.1/tcp/0 --key-file {home}/dht --join {nobody}",
        "No peer answers at {nobody}: check that it",
    ),
    "dht: port taken": (
        "dht --listen {taken_dht} --key-file {home}/dht",
        "{taken_dht} is taken; choose another port",
    ),
    "dht: not a key": (
        "dht --key-file {good}",
        "good holds no key of a DHT node: move it away, then a new key is created",
    ),
    "dht: no host": ("dht --public-host a/b", "'a/b' is not a host: write HOST or HOST:PORT"),
    "dht: no public port": (
        "dht --listen /ip4/127.0.0.1/tcp/0 --public-host a",
        "others cannot reach a at port 0: write --public-host HOST:PORT",
    ),
    "no configuration": ("--config /no/file key", "/no/file cannot be read .*: give another --config"),
    "client: no address to join": ("status {small} --join here", "'here' is not an address to join with: copy"),
    "client: a hole": ("generate {small} hi --join {holed}", "blocks 4..5 of .* are served by nobody: start a peer"),
    "client: other weights": ("generate {fine_tuned} hi --join {holed}", "this swarm serves other weights than your"),
    "status: other weights": ("status {fine_tuned} --join {holed}", "this swarm serves other weights than your"),
    "client: no such codec": ("generate {small} hi --join {holed} --codec zip", "there is no codec 'zip'; use one of"),
    "client: no layer for drafts": (
        "generate {small} hi --join {holed} --speculate mtp",  # This error comes before that of missing blocks.
        "small.* has no layer for multi-token prediction: speculate by 'auto'",
    ),
    "client: no head for drafts": (
        "generate {small} hi --join {holed} --speculate eagle=/no/head",
        "there is no folder /no/head: give",
    ),
    "client: no prompt": ("generate {small} - --join {holed}", "the prompt is empty: give some text"),
    "client: long prompt": (
        "generate {small} {long} --join {private}",
        "more than the model's context of 256: shorten",
    ),
    "serve: port taken": (
        "serve {small} --join {nobody} --port {taken_port}",
        "127.0.0.1:{taken_port} is taken: choose another --port, or 0 for any free one",
    ),
    "serve: not this machine": (
        "serve {small} --join {nobody} --host 203.0.113.5",
        "cannot listen on 203.0.113.5:8000 .*: give an address of this machine as --host",
    ),
    "serve: no keys": (
        "serve {small} --join {nobody} --port 0 --api-key-file /no/keys",
        "the API keys in /no/keys cannot be read .No such file or directory.: give a file with one key per line",
    ),
    "serve: nobody to join": ("serve {small} --join {nobody} --port 0", "No peer answers at {nobody}: check that"),
    "serve: other weights": (
        "serve {fine_tuned} --join {holed} --port 0",
        "this swarm serves other weights than your",
    ),
    "serve: no layer for drafts": (
        "serve {small} --join {holed} --port 0 --speculate mtp",
        "small.* has no layer for multi-token prediction: speculate by 'auto'",
    ),
    "serve: no head for drafts": (
        "serve {small} --join {holed} --port 0 --speculate eagle=/no/head",
        "there is no folder /no/head: give",
    ),
    "tune: no data": (f"{TUNE} {{home}}/none", "none cannot be read .No such file or directory.: give a file of JSON"),
    "tune: a bad line": (f"{TUNE} {{bad_line}}", "line 2: no JSON at character 13 of the line .*: give a whole"),
    "tune: too long": (f"{TUNE} {{good}} --max-length 3", "line 1: \\d tokens are more than 3: shorten it or raise"),
    "tune: longer than the context": (
        f"{TUNE} {{good}} --method prompt --max-length 250",
        "250 tokens and 16 virtual ones are more than the model's context of 256: lower --max-length to 240",
    ),
    "tune: more virtual tokens than the context": (
        f"{TUNE} {{good}} --method prompt --tokens 512",
        "2 tokens and 512 virtual ones are more than the model's context of 256: lower --tokens",
    ),
    "tune: nowhere to put the text": (f"{TUNE} {{good}} --template x", "the template has no {{text}}: write it where"),
    "tune: a head without labels": (f"{TUNE} {{plain}} --head", "--head needs labels, and the data has none: give"),
    "tune: one label": (f"{TUNE} {{one_label}}", "all examples have the label 'lights': give examples"),
    "tune: only warm-up": (f"{TUNE} {{plain}} --warmup 100", "100 steps of warm-up leave no other steps of 100: lower"),
    "tune: nothing learned": (f"{TUNE} {{plain}} --lr 0", "with --lr 0 nothing is learned: leave it out"),
    "tune: nothing to resume": (f"{TUNE} {{plain}} --resume", "holds no run to continue: leave out --resume"),
    "bench: no arm": ("bench {small}", "there is nothing to measure: give --join ADDR for a swarm, --local"),
    "bench: no test": ("bench {small} --local --prefill 0 --decode 0", "leave nothing to measure: give tokens to one"),
    "bench: a long prompt": (
        "bench {small} --join {nobody} --prefill 8 --prefill 257",
        "a prompt of 257 tokens is more than the model's context of 256: lower --prefill",
    ),
    "bench: a long answer": (
        "bench {small} --local --prefill 0 --context 200 --decode 57",
        "57 tokens after a context of 200 are 257 positions, more than the model's context of 256: lower --context",
    ),
    "bench: no such codec": ("bench {small} --join {holed} --codec zip", "there is no codec 'zip'; use one of"),
    "bench: a hole": ("bench {small} --join {holed} --prefill 8", "blocks 4..5 of .* are served by nobody: start a"),
    "tune: no such layer": (
        f"{TUNE} {{plain}} --join {{private}} --targets wing",
        "no layer 'wing' for --targets: take",
    ),
}
SAID_BY_OTHERS = {
    "bench: a hole",
    "bench: no such codec",
    "serve: no head for drafts",
    "serve: no layer for drafts",
    "serve: nobody to join",
    "serve: other weights",
    "status: other weights",
}
"""Failures that another command reports in the same sentence."""


@pytest.fixture(scope="module")
def words(
    small: Path, fine_tuned: Path, holed: str, private: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The values of the words in braces."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "good").write_text(
        '{"text": "it is dark in here", "label": "lights"}\n{"text": "sing", "label": "music"}'
    )
    (folder / "one_label").write_text('{"text": "it is dark in here", "label": "lights"}')
    (folder / "ggufs").mkdir()
    for name in ("a", "b"):
        (folder / "ggufs" / f"{name}.gguf").touch()
    (folder / "plain").write_text('{"text": "it is dark in here"}')
    (folder / "bad_line").write_text('{"text": "a"}\n{"text": "b"')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        yield {
            "small": str(small),
            "fine_tuned": str(fine_tuned),
            "holed": holed,
            "private": private,
            "nobody": NOBODY,
            "no_peer": NO_PEER,
            "no_peer_text": re.escape(NO_PEER),
            "home": str(folder / "home"),
            **{name: str(folder / name) for name in ("good", "ggufs", "plain", "bad_line", "one_label")},
            "taken": f"tcp://127.0.0.1:{port}",
            "taken_port": str(port),
            "taken_dht": f"/ip4/127.0.0.1/tcp/{port}",
            "long": "very_" * 300 + "long",
        }


@pytest.mark.default_cases(name=tuple(FAILURES.keys() - SAID_BY_OTHERS))
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_sentence_with_its_remedy(
    words: dict[str, str], here: Here, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_cache, "ARRIVE_S", 0.0)
    arguments, sentence = FAILURES[name]
    finished = here(*arguments.format_map(words).split())
    assert re.search(sentence.format_map(words), finished.error), finished.error
    assert not finished.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("demo /no/such/folder", "there is no folder /no/such/folder: give"),
        ("peer {small} --blocks 4:9", "has blocks 0..5: use --blocks"),
    ],
)
def test_errors_are_reported_before_a_process_starts(
    words: dict[str, str], here: Here, arguments: str, sentence: str
) -> None:
    finished = here(*arguments.format_map(words).split())
    assert sentence in finished.error and not re.search("start|swarm", finished.errors), finished.errors


def test_a_server_prints_its_progress_before_it_serves(words: dict[str, str], here: Here) -> None:
    told = here(*"serve {small} --join {nobody} --port 0".format_map(words).split()).errors.splitlines()
    assert told[0] == "opening the checkpoint ..." and "joining the swarm and loading the client part ..." in told


def test_an_unreachable_join_address_is_reported_without_library_messages(words: dict[str, str], here: Here) -> None:
    assert "bootstrap" not in here(*"status {small} --join {nobody}".format_map(words).split()).error


def test_a_command_of_another_program_is_answered_with_equivalent_commands(here: Here) -> None:
    told = " ".join(here("train", "demo").errors.split())
    assert "Did you mean 'tune'?" in told and "trusted" not in told


def test_every_command_that_takes_a_model_takes_a_gguf_file(here: Here) -> None:
    for command in ("peer", "generate", "status", "doctor", "demo"):
        assert "GGUF file" in " ".join(here(command, "--help").output.replace("│", " ").split()), command


@pytest.mark.full
def test_failures_in_separate_processes(words: dict[str, str], home: Path) -> None:
    failing = [FAILURES[name] for name in ("client: a hole", "port taken")]
    # Only another process can run without access to the hub.
    failing.append(("peer no-such/model", "no-such/model is neither a folder here nor in the cache"))
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda failure: run(home, *failure[0].format_map(words).split()), failing))
    for finished, (_, sentence) in zip(ends, failing, strict=True):
        assert re.search(sentence.format_map(words), finished.error), finished.error
        assert not finished.output


@pytest.mark.parametrize(
    "arguments",
    [
        "generate demo",
        "peer",
        "peer demo --dtype int3",
        "peer demo --weights int3",
        "peer demo --blocks 0:1 --memory 1GiB",
        "peer demo --relay-rate 1MiB",
        "dht --relay-port 0 --relay-rate 0",
        "dht --authorized-keys keys.txt",
        "generate demo hi --join {nobody} --temperature -1",
        "fly",
    ],
)
def test_wrong_usage_has_exit_code_2(here: Here, arguments: str) -> None:
    finished = here(*arguments.format(nobody=NOBODY).split())
    assert finished.code == 2
    assert "Usage: " in finished.errors and not finished.output


def test_a_process_has_the_exit_code_of_its_command(home: Path) -> None:
    finished = run(home, "fly")
    assert finished.code == 2
    assert "Usage: " in finished.errors and not finished.output


@pytest.mark.default_cases(number=(signal.SIGTERM,))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_peer_leaves_cleanly(
    number: signal.Signals, small: Path, holed: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = Checkpoint.open(small).fingerprint
    with DhtDirectory.start(initial_peers=[holed]) as directory:

        def served() -> list[tuple[int, int]]:
            return sorted((record.start, record.end) for record in directory.peers(fingerprint))

        with starting(tmp_path, small, *KV, "--blocks", "4:6", "--join", holed) as daemon:
            assert not daemon.serves
            daemon.address()
            # The peer can be found as soon as the file exists.
            assert served() == [(0, 4), (4, 6)]
            assert daemon.stop(number) < 10
            assert daemon.process.returncode == 0
            assert served() == [(0, 4)]
            assert not daemon.serves and not list(tmp_path.glob("*.address*"))
            assert daemon.log.splitlines()[-1].startswith("leaving the swarm")
    table = here("status", str(small), "--join", holed)
    said = re.search(r"4..5 are served by nobody: start a peer with `splitnet peer (.*)`", table.output)
    assert said is not None, "on one line, whatever the width of the terminal"
    copied = get_command(app).commands["peer"].make_context("peer", shlex.split(said[1])).params  # type: ignore[attr-defined]
    assert (copied["model"], copied["blocks"], copied["join"]) == (str(small), "4:6", [holed])
    monkeypatch.setenv("COLUMNS", "80")
    told = json.loads(here("status", str(small), "--json", "--join", holed).output)
    assert told["lied"] == {}
    (peer,) = told["peers"]
    narrow = here("status", str(small), "--join", holed).output
    assert f"{peer['device']} {peer['dtype']}" in narrow and peer["key"][:9] in narrow
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    evidence_folder(fingerprint).mkdir(parents=True)
    (evidence_folder(fingerprint) / f"{peer['key']}.evidence").touch()
    assert "has lied, and is not used" in here("status", str(small), "--join", holed).output
    command = f"splitnet peer {small.name} --blocks 4:6 --join {holed}"
    listed = here("models", "--join", holed).output
    assert re.search(rf"^{small.name} +4 of 6 +1 +0 to 1 +- *$", listed, re.MULTILINE)
    assert f"blocks 4..5 of {small.name} are served by nobody: start a peer with `{command}`" in listed
    (model,) = json.loads(here("models", "--json", "--join", holed).output)
    assert (model["model"], model["missing"], model["commands"]) == (small.name, [[4, 6]], [command])
    assert (model["replicas"], model["tokens_per_s"]) == ([1, 1, 1, 1, 0, 0], 0.0)


@pytest.mark.full
def test_a_peer_may_hold_its_weights_as_float16(small: Path, here: Here, tmp_path: Path) -> None:
    with starting(tmp_path, small, *KV, "--blocks", "0:6", "--weights", "float16") as daemon:
        address = daemon.address()
        assert "(float32 with weights as float16 on cpu)" in daemon.log
        told = here("generate", str(small), "--join", address, "--max-new-tokens", "4", "Hello")
        assert told.code == 0 and told.output.strip()
        status = json.loads(here("status", str(small), "--json", "--join", address).output)
        assert [peer["dtype"] for peer in status["peers"]] == ["float16/float32"]


def imports_torch(daemon: Daemon) -> bool:
    """Whether a process has begun to import torch."""
    return any("libtorch_cpu" in region.path for region in psutil.Process(daemon.process.pid).memory_maps())


@pytest.mark.full
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (imports_torch, signal.SIGTERM),
        (imports_torch, signal.SIGINT),
        ("open the checkpoint", signal.SIGTERM),
        ("start a swarm", signal.SIGINT),
        ("load blocks", signal.SIGTERM),
        ("measure the device", signal.SIGINT),
    ],
)
def test_a_peer_can_be_stopped_while_it_starts(
    small: Path, tmp_path: Path, moment: str | Callable[[Daemon], bool], number: signal.Signals
) -> None:
    with starting(tmp_path, small, *KV, "--blocks", "0:6") as daemon:
        daemon.wait_for(lambda: moment in daemon.log if isinstance(moment, str) else moment(daemon))
        assert daemon.stop(number) < 10
        assert daemon.process.returncode in (128 + number, 0 if "leaving the swarm" in daemon.log else None)
        assert not daemon.serves and "Traceback" not in daemon.log and "rror" not in daemon.log


@pytest.mark.full
def test_a_peer_can_be_stopped_while_it_waits_for_other_peers(small: Path, tmp_path: Path) -> None:
    with starting(tmp_path, small, *KV, "--join-file", str(tmp_path / "never")) as daemon:
        daemon.wait_for(lambda: "join the swarm" in daemon.log)
        assert daemon.stop(signal.SIGTERM) < 10
        assert daemon.process.returncode == 128 + signal.SIGTERM
        assert daemon.log.splitlines()[-1] == "join the swarm ..."


def test_options_are_read_from_a_configuration_file(
    private: str, small: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[common]\njoin = ["{private}"]\n[generate]\nmax-new-tokens = 4\nchatty = 0\n')
    monkeypatch.setenv("SPLITNET_CONFIG", str(file))
    wrong = here("generate", str(small), "bees")
    assert wrong.error == f"{file}: [generate] has no key 'chatty'; the nearest is 'chat'"
    file.write_text(file.read_text().replace("chatty = 0", "chat = false"))
    asked = here("generate", str(small), "bees")
    arguments = ("--join", private, "--max-new-tokens", "4", "--raw")
    assert asked.output == here("--config", os.devnull, "generate", str(small), "bees", *arguments).output != ""


@pytest.mark.full
def test_peers_and_clients_join_through_a_bootstrap_node(small: Path, here: Here, tmp_path: Path) -> None:
    at = ("--listen", "/ip4/127.0.0.1/tcp/0", "--key-file", str(tmp_path / "node-key"))
    with ExitStack() as at_end:
        node = at_end.enter_context(daemon(tmp_path, "dht", *at))
        known: list[str] = []
        for blocks in DUO_SPANS:
            options = PeerOptions(
                wish=SpanWish(blocks), initial_peers=[node.address()], listen="tcp://127.0.0.1:0", kv_memory=2**26
            )
            peer = RunningPeer.start(small, options)
            at_end.callback(peer.close)
            known += peer.directory.addresses
        generate = ("generate", str(small), "bees", "--max-new-tokens", "4", "--codec", "none", "--join")
        through_node = here(*generate, node.address())
        assert through_node.code == 0 and through_node.output.strip()
        node.process.kill()
        node.process.wait()
        for address in known:
            assert here(*generate, address).output == through_node.output


@pytest.mark.full
def test_peers_and_clients_join_through_a_peers_own_port(small: Path, home: Path, here: Here, tmp_path: Path) -> None:
    generate = ("generate", str(small), "bees", "--max-new-tokens", "4", "--codec", "none", "--join")
    with starting(tmp_path, small, *KV, "--blocks", "0:2") as first:
        multiaddr = first.address()
        own, node = re.findall(r'--join "?([^\s"]+)', first.log)
        assert node == multiaddr and own.startswith("tcp://127.0.0.1:")
        with starting(tmp_path, small, *KV, "--blocks", "2:6", "--join", own) as second:
            address = second.address()
            assert re.findall(r'--join "(\S+)"', second.log) == [address]
            told = run(home, *generate, address)
            assert told.code == 0 and told.output == here(*generate, multiaddr).output != ""
            shown = here("status", str(small), "--join", address).output
            assert f'--join "{own}"' in shown and f'--join "{address}"' in shown
            found = here("doctor", str(small), "--join", address, "--join", multiaddr, "--json")
            findings = json.loads(found.output)["findings"]
            assert [one["status"] for one in findings if one["check"] == "join"] == ["pass", "pass"]
            assert second.stop() < 10
        missing = here("generate", str(small), "bees", "--join", own)
        assert "blocks 2..5" in missing.error


def test_an_invitation_suffices_to_join_and_can_be_revoked(small: Path, here: Here, tmp_path: Path) -> None:
    swarm_key, keys, other_key = tmp_path / "swarm.key", tmp_path / "keys", tmp_path / "other.key"
    for file in (swarm_key, other_key):
        assert here("key", "--swarm-key", str(file)).code == 0
    keys.write_text(here("key").output)
    closed = ("--swarm-key", str(swarm_key), "--authorized-keys", str(keys))

    def invite(name: str, join: str) -> str:
        file = str(tmp_path / f"{name}.invite")
        made = here("invite", str(small), "--join", join, *closed, "--output", file, "--name", name)
        assert made.code == 0 and f"invites {name}" in made.output
        return file

    with local_swarm(small, [(0, 4)], swarm_key=SwarmKey.load(swarm_key), authorized_keys=keys) as swarm:
        address = swarm.peers[0].join_address
        assert address.startswith("tcp://")
        anna, bob = invite("anna", address), invite("bob", address)
        with daemon(tmp_path, "peer", *LOOPBACK, *KV, "--blocks", "4:6", "--invite", anna) as second:
            assert second.address().startswith("tcp://")
            generate = ("generate", "--max-new-tokens", "4", "--codec", "none")
            own = (*generate, str(small), "bees", "--join", address, "--swarm-key")
            told = here(*generate, "--invite", bob, "bees")
            assert told.output == here(*own, str(swarm_key)).output != ""
            assert "every block is served" in here("status", "--invite", bob).output
            assert "pass coverage" in here("doctor", "--invite", bob).output
            assert "another swarm key, or none" in here(*own, str(other_key)).error
            trusted = tmp_path / "trusted"
            trusted.write_text(here("key").output)
            assert (
                "you trust none of them"
                in here(*generate, "--invite", bob, "bees", "--trusted-peers", str(trusted)).error
            )
            keys.write_text("".join(line for line in keys.read_text().splitlines(True) if "bob" not in line))
            deadline = time.monotonic() + 10
            while (refused := here(*generate, "--invite", bob, "bees")).code == 0:
                assert time.monotonic() < deadline
            assert re.search("does not accept (this|your) (client.s )?key", refused.error)
            kept = here(*own, str(swarm_key))
            assert kept.output == told.output, kept.error


def test_status_in_json(address: str, demo_checkpoint: Path, here: Here) -> None:
    shown = here("status", str(demo_checkpoint), "--json", "--join", address)
    assert shown.code == 0 and not shown.errors
    status: dict[str, Any] = json.loads(shown.output)
    checkpoint = Checkpoint.open(demo_checkpoint)
    assert status["fingerprint"] == checkpoint.fingerprint
    assert (status["model"], status["num_blocks"], status["missing"]) == (checkpoint.name, 30, [])
    assert [(peer["start"], peer["end"]) for peer in status["peers"]] == SPANS
    for peer in status["peers"]:
        assert peer["key"].startswith("sn1") and peer["address"].startswith("tcp://127.0.0.1:")
        assert len(peer["block_ms"]) == 5 and min(peer["block_ms"]) > 0
        assert peer["kv_free_positions"] > 0 and "int8" in peer["codecs"]
        assert (peer["device"], peer["dtype"]) == ("cpu", "float32")


def test_chat_of_two_turns(address: str, demo_checkpoint: Path, local: Any, tokenizer: Any, here: Here) -> None:
    turns = ["My name is Ada. Who are you?", "What is my name?"]
    arguments = ("chat", str(demo_checkpoint), "--join", address, "--codec", "none", "--max-new-tokens", "10")
    chat = here(*arguments, given="".join(turn + "\n" for turn in turns))
    assert chat.code == 0 and not chat.errors
    messages: list[dict[str, str]] = []
    expected = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = local.generate(**inputs, max_new_tokens=10, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert chat.output == expected


def test_generate_with_statistics(address: str, demo_checkpoint: Path, here: Here) -> None:
    arguments = ("generate", str(demo_checkpoint), "--join", address, "--codec", "int8", "--max-new-tokens", "16")
    answer = here(*arguments, "--stats", "What is the capital of France?")
    assert answer.code == 0
    assert "Paris" in answer.output
    for start, end in SPANS:
        assert f"blocks {start}..{end - 1}" in answer.errors
    assert re.search(r"\d+ prompt tokens, \d+ new; time to first token \d+ ms, then [\d.]+ tokens/s", answer.errors)


@pytest.mark.default_cases(by_themselves=(False,))
@pytest.mark.parametrize("by_themselves", [False, True], ids=["here", "as processes"])
def test_generate_samples_by_seed_reads_stdin_and_takes_a_raw_prompt(
    private: str, small: Path, home: Path, here: Here, by_themselves: bool
) -> None:
    start = ("generate", str(small), "--join", private, "--max-new-tokens", "12")
    sampled = (*start, "--raw", "--temperature", "1", "bees")
    once = partial(run, home) if by_themselves else here
    answers = {
        "sampled": once(*sampled, "--seed", "3"),
        "piped": once(*start, "--raw", "-", given="bees"),
        "repeated": here(*sampled, "--seed", "3"),
        "other": here(*sampled, "--seed", "4"),
        "raw": here(*start, "--raw", "bees"),
        "chat": here(*start, "--chat", "bees"),
    }
    assert all(answer.code == 0 and not answer.errors for answer in answers.values()), answers
    texts = {name: answer.output for name, answer in answers.items()}
    assert texts["sampled"] == texts["repeated"] != texts["other"]
    assert texts["piped"] == texts["raw"] != texts["chat"]


@pytest.mark.full
def test_a_client_without_an_accepted_key_gets_an_error_at_once(
    private: str, small: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITNET_KEY_FILE", str(tmp_path / "key"))
    finished = here("generate", str(small), "hi", "--join", private)
    assert re.search("does not accept this client's key.*`splitnet key`.*--authorized-keys", finished.error)
    assert not finished.output
    assert finished.seconds < 20


@pytest.mark.default_cases(spans=([(0, 5)],))
@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 2), (3, 5)]], ids=len)
def test_demo(small: Path, home: Path, spans: list[tuple[int, int]]) -> None:
    peers = ("--peers", str(len(spans)))
    demo = run(home, "demo", str(small), *peers, "--max-new-tokens", "8", "--prompt", "bees")
    assert demo.code == 0
    assert demo.output.startswith("\n> bees\n\n")
    for number, (first, last) in enumerate(spans, 1):
        assert f"daemon {number}: blocks {first}..{last}\n" in demo.errors
    assert "nothing is running any more" in demo.errors
