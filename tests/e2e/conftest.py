"""Fixtures of the end-to-end tests: daemons of the demo model, peers of a small model, and commands run in this
process."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import splitnet
from splitnet.cli.main import main
from tests.e2e.daemons import Daemon, Finished, daemons
from tests.e2e.small_model import small_model
from tests.swarm.harness import local_swarm

SPANS = [(0, 7), (7, 19), (19, 30)]
DUO_SPANS = [(0, 2), (2, 6)]

Here = Callable[..., Finished]


@pytest.fixture(scope="session")
def trio(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three daemons that serve the demo model, one span each."""
    options = ("--kv-memory", "256MiB", "--metrics-port", "0")
    with daemons(tmp_path_factory.mktemp("trio"), demo_checkpoint, SPANS, *options) as running:
        yield running


@pytest.fixture(scope="session")
def address(trio: list[Daemon]) -> str:
    """The address to join the swarm of the three daemons."""
    return trio[0].address()


@pytest.fixture(scope="session")
def small(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with the tokenizer of the demo model."""
    return small_model(tmp_path_factory.mktemp("small"), demo_checkpoint, seed=0)


@pytest.fixture(scope="session")
def duo(small: Path) -> Iterator[str]:
    """The address of two peers that serve the small model. The peers run in this process, which has loaded the
    libraries."""
    with local_swarm(small, DUO_SPANS) as swarm:
        yield swarm.addresses[0]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the user's key."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """Returns a function that runs a command in this process, which has loaded the libraries already: a new process
    would take seconds to load them."""
    monkeypatch.setenv("SPLITNET_KEY_FILE", str(home / "key"))
    monkeypatch.setenv("COLUMNS", "100")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def run_here(*arguments: str, given: str = "") -> Finished:
        monkeypatch.setattr(sys, "argv", ["splitnet", *arguments])
        monkeypatch.setattr(sys, "stdin", StringIO(given))
        capfd.readouterr()
        began = time.monotonic()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        said = capfd.readouterr()
        return Finished(code, said.out, said.err, time.monotonic() - began)

    yield run_here
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer(demo_checkpoint: Path) -> Any:
    """The tokenizer of the demo model."""
    return splitnet.AutoTokenizer.from_pretrained(demo_checkpoint, padding_side="left")


@pytest.fixture(scope="session")
def local(demo_checkpoint: Path) -> PreTrainedModel:
    """The demo model in plain transformers, which converts the codes of the file to numbers."""
    folder, file = demo_checkpoint.parent, demo_checkpoint.name
    with pytest.MonkeyPatch.context() as patch:
        for slow in ("GGUFReader", "get_tensor_name_map"):  # transformers calls these repeatedly with equal arguments.
            patch.setattr(gguf, slow, cache(getattr(gguf, slow)))
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
