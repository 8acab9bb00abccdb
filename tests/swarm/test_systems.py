"""Swarms without hivemind, on this system and on emulated ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.other_system import ROOT

pytestmark = pytest.mark.swarm

PROGRAM = """
import pathlib, signal, sys
from tests.other_system import FREE_BYTES, become, modules

system, folder = sys.argv[1:]
become(system)
import importlib
for name in modules():
    importlib.import_module(name)

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from peers.running_peer import RunningPeer
from peers.peer_options import PeerOptions
from peers.peer_options import SpanWish
import splitnet
from splitnet.cli.main import app
from splitnet.cli.daemon import StopSignals
from splitnet.errors import SplitnetError
from splitnet.quant.device import free_memory, keep_freed_memory, trim_memory
from splitnet.security.identity import Identity

assert not {name for name in sys.modules if name.partition(".")[0] in ("hivemind", "multiaddr", "uvloop")}
keep_freed_memory()
trim_memory()
free = free_memory("cpu")
assert free == FREE_BYTES if system == "win32" else free > 0, free

key_file = pathlib.Path(folder, "key")
assert Identity.load_or_create(key_file).public == Identity.load_or_create(key_file).public

# A swarm that never had a DHT.
def peer(blocks, *join):
    where = {"listen": "tcp://127.0.0.1:0", "initial_peers": join}
    return RunningPeer.start(folder, PeerOptions(wish=SpanWish(blocks=blocks), kv_memory=2**26, weights=None, **where))

ids = torch.arange(3, 12)[None]
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
whole = AutoModelForCausalLM.from_pretrained(folder).generate(ids, attention_mask=torch.ones_like(ids), **options)
first = peer((0, 3))
second = peer((3, 6), first.join_address)
assert not first.directory.addresses and not second.directory.addresses
for joined in (first, second):
    model = splitnet.AutoModelForCausalLM.from_pretrained(
        folder, initial_peers=[joined.join_address], codec="none", identity=Identity.generate()
    )
    remote = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.close()
    assert torch.equal(remote, whole), (remote, whole)

# What needs hivemind says so, and names the other way.
node = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
for command, *words in (
    (["dht", "--listen", "/ip4/127.0.0.1/tcp/0"], "hivemind", "splitnet peer"),
    (["status", folder, "--join", node], "hivemind", "--join tcp://"),
    (["generate", folder, "prompt", "--lan"], "hivemind", "--join tcp://"),
    (["peer", folder, "--blocks", "0:3", "--dht-listen", "/ip4/127.0.0.1/tcp/0"], "hivemind", "--dht-listen"),
    (["peer", folder, "--blocks", "0:3", "--lan"], "hivemind", "--lan"),
):
    refusal = CliRunner().invoke(app, command).exception
    assert isinstance(refusal, SplitnetError), (command, refusal)
    assert all(word in str(refusal) for word in words), (command, refusal)
examined = CliRunner().invoke(app, ["doctor", "--join", node])
assert examined.exit_code == 1 and "hivemind" in examined.output and "--join tcp://" in examined.output, examined.output

second.close()
first.close()

stop = StopSignals()
stop.raise_if_stopped()
signal.raise_signal(signal.SIGTERM)
stop.wait()
print("done")
"""


@pytest.mark.full
@pytest.mark.parametrize("system", ["here", "win32", "darwin", "android"])
def test_peers_and_clients_without_hivemind(system: str, folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, system, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=110
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stdout + ended.stderr
