"""Settings for all tests: one torch thread, the demo checkpoint, and no test may leave threads or processes running."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The variable is set before torch is imported, and peer daemons inherit it. Tests share few cores, and with one thread
# sums are reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests start many processes: later ones read the bytecode that the first one has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from splitnet.blocks import chosen_device
from splitnet.checkpoint import demo
from splitnet.errors import SplitnetError
from tests.leftovers import RUN_MARK, Running, end_leftovers, end_run
from tests.sharing import FilesTogether, longest_first
from tests.tiers import TIERS, load_profile, select


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=TIERS, default="default", help="which tests run, see tests/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    """Removes the influence of the user's splitnet settings and of other peers on this network."""
    load_profile(config.option.tier)
    if not hasattr(config, "workerinput"):
        os.environ[RUN_MARK] = uuid.uuid4().hex
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # So SIGTERM ends all processes of the run.
    for name in [name for name in os.environ if name.startswith("SPLITNET_") and name != "SPLITNET_CACHE"]:
        del os.environ[name]
    os.environ["SPLITNET_CONFIG"] = os.devnull
    os.environ["SPLITNET_LAN"] = "false"
    os.environ["SPLITNET_DEVICE"] = "cpu"
    look = chosen_device.find_present
    # Hides GPUs: tests compare values with those of CPUs, and GPU tests name their device.
    chosen_device.find_present = lambda *, tried=True: chosen_device.TorchDevices() if tried else look(tried=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the processes of the run; pytest calls this after an interruption, too."""
    if not hasattr(config, "workerinput"):
        end_run(os.environ.pop(RUN_MARK))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers for the whole suite, because tests wait half of their time. No workers for a part of the tests,
    because a worker takes seconds to start."""
    return 3 if config.args == config.getini("testpaths") and not config.option.keyword else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test named by its id on the command line always runs.
    named = any("::" in argument for argument in config.args)
    chosen, others = select(items, "all" if named else config.option.tier)
    config.hook.pytest_deselected(items=others)
    items[:] = longest_first(chosen)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepares the demo checkpoint before the first test: a slow download must not run into a test's timeout."""
    wanted = any("demo_checkpoint" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    try:
        demo.demo_checkpoint()
    except SplitnetError:
        return  # The fixture raises the error again in the tests that need the checkpoint.


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return demo.demo_checkpoint()


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails a test that leaves a thread or a child process behind; threads and processes of fixtures with a wider scope
    may stay."""
    before = Running()
    yield
    left = end_leftovers(before)
    if left:
        pytest.fail(f"The test left running: {'; '.join(left)}", pytrace=False)
