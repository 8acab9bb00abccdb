"""A stop signal raises only where no work is half done; the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest

from splitnet.cli.daemon import StopSignals
from splitnet.import_shims import _signals_held
from tests.leftovers import RUN_MARK, end_run

TWO_SIGNALS = """
import asyncio, signal
from splitnet.cli.daemon import StopSignals
from splitnet.directory.hivemind_node import NodeLoop

stop = StopSignals()
stop.raise_if_stopped()
loop = NodeLoop()
asyncio.set_event_loop(loop)
child = loop.run_until_complete(asyncio.create_subprocess_exec("sleep", "60"))
print(child.pid, flush=True)
signal.raise_signal(signal.SIGTERM)
print("goes on", flush=True)
signal.raise_signal(signal.SIGINT)
print("is not reached", flush=True)
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may run under nohup.
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_processes_of_an_interrupted_test_run_are_ended() -> None:
    """A killed worker runs no teardown of fixtures, and its daemons have no parent."""
    mark = uuid.uuid4().hex
    shell = ["sh", "-c", "sleep 600 >/dev/null & echo $!"]
    started = subprocess.run(shell, env={**os.environ, RUN_MARK: mark}, stdout=subprocess.PIPE, text=True, check=True)
    orphan = psutil.Process(int(started.stdout))
    assert end_run(uuid.uuid4().hex) == []
    assert orphan.is_running()
    assert end_run(mark) == [orphan.pid]
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_a_signal_before_the_first_step_ends_the_process_at_once() -> None:
    program = "import signal; from splitnet.cli.daemon import StopSignals; stop = StopSignals()"
    program += "; signal.raise_signal(signal.SIGTERM); print('goes on')"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_raises_at_the_next_check(number: signal.Signals) -> None:
    stop = StopSignals()
    stop.raise_if_stopped()
    signal.raise_signal(number)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            stop.raise_if_stopped()
        assert end.value.code == 128 + number


def test_an_earlier_signal_ends_the_wait_and_the_next_one_raises() -> None:
    stop = StopSignals()
    stop.raise_if_stopped()
    signal.raise_signal(signal.SIGTERM)
    stop.wait()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_lost_terminal_ends_a_daemon_and_nohup_keeps_it() -> None:
    stop = StopSignals()
    stop.raise_if_stopped()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(SystemExit):
        stop.wait()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignals()
    stop.raise_if_stopped()
    signal.raise_signal(signal.SIGHUP)
    stop.raise_if_stopped()


def test_the_second_signal_ends_the_process_and_its_children_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", TWO_SIGNALS], stdout=subprocess.PIPE, text=True, timeout=60)
    pid, *said = ended.stdout.splitlines()
    assert (ended.returncode, said) == (128 + signal.SIGINT, ["goes on"])
    deadline = time.monotonic() + 10
    while runs(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_first_signal_waits_for_the_end_of_an_import() -> None:
    arrived: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    with _signals_held():
        signal.raise_signal(signal.SIGTERM)
        assert not arrived
    assert arrived == [signal.SIGTERM]
    with _signals_held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert arrived == [signal.SIGTERM] * 3


def test_a_held_signal_raises_after_the_import() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    imported = False
    with pytest.raises(KeyboardInterrupt), _signals_held():
        signal.raise_signal(signal.SIGINT)
        imported = True
    assert imported
