"""The announcer: a peer's first record, refreshes, changes, and refused records."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from typing import Any, cast

import pytest

from splitnet.directory.announcer import FIRST_TRIES, SOON, Announcer
from splitnet.directory.ask import PeerDirectory
from splitnet.errors import DirectoryError


class Slow:
    """A directory whose calls block until the test releases them, and which refuses a record older than the last
    one."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.go_on = threading.Semaphore(0)
        self.taken: list[float] = []
        self.moves = 0

    def address_changed(self) -> None:
        self.moves += 1

    def announce(self, record: float, identity: Any) -> bool:
        self.begun.put(record)
        assert self.go_on.acquire(timeout=20)
        is_later = record > max(self.taken, default=0.0)
        self.taken.append(record)
        return is_later

    def withdraw(self, record: Any, identity: Any) -> None:
        pass


def slow_announcer(directory: Slow, refresh_s: float = 1000.0) -> tuple[Announcer, list[float]]:
    looked: list[float] = []
    count = itertools.count(1.0)
    announcer = Announcer(
        cast(Any, directory),
        cast(Any, None),
        lambda: cast(Any, next(count)),
        lambda: looked.append(time.monotonic()),
        refresh_s=refresh_s,
    )
    directory.go_on.release(2)  # for the first record, and for the record of the first refresh
    announcer.start()
    assert [directory.begun.get(timeout=20) for _ in range(2)] == [1.0, 2.0]
    return announcer, looked


def test_two_threads_that_publish_keep_the_order_of_records(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the record that was made first could arrive last and be refused, and the warning would blame the
    clock."""
    directory = Slow()
    announcer, _ = slow_announcer(directory)
    others = [threading.Thread(target=announcer.publish) for _ in range(3)]
    for other in others:
        other.start()
    directory.begun.get(timeout=20)
    with pytest.raises(queue.Empty):
        directory.begun.get(timeout=0.05)
    directory.go_on.release(3)
    for other in others:
        other.join()
    announcer.close()
    assert directory.taken == sorted(directory.taken) and not caplog.records


def test_changes_are_published_at_once_up_to_a_bound() -> None:
    directory = Slow()
    announcer, looked = slow_announcer(directory)
    directory.go_on.release(1000)
    for number in range(SOON):
        announcer.publish_soon()
        assert directory.begun.get(timeout=20) == 3.0 + number
    announcer.publish_soon()
    with pytest.raises(queue.Empty):
        directory.begun.get(timeout=0.05)
    announcer.close()
    assert len(looked) == 1


def test_a_moved_machine_is_announced_and_measures_peers_again() -> None:
    directory = Slow()
    announcer, looked = slow_announcer(directory)
    directory.go_on.release(1000)
    announcer.publish_soon(moved=True)
    assert directory.begun.get(timeout=20) == 3.0 and directory.begun.get(timeout=20) == 4.0
    announcer.close()
    assert len(looked) == 2 and directory.moves == 1


class LateDirectory:
    """A directory that answers only after `failures` failed calls."""

    def __init__(self, failures: int) -> None:
        self.asked = 0
        self._failures = failures

    def announce(self, record: Any, identity: Any) -> bool:
        self.asked += 1
        if self.asked <= self._failures:
            raise DirectoryError("The DHT did not answer.")
        return True

    def withdraw(self, record: Any, identity: Any) -> None:
        pass


@pytest.mark.parametrize("failures", [0, FIRST_TRIES - 1, FIRST_TRIES])
def test_a_directory_that_is_late_is_asked_again(failures: int) -> None:
    directory = LateDirectory(failures)
    announcer = Announcer(cast(Any, directory), cast(Any, None), lambda: cast(Any, 1.0), lambda: None, refresh_s=1000.0)
    if failures < FIRST_TRIES:
        announcer.start()
        assert directory.asked >= failures + 1
    else:
        with pytest.raises(DirectoryError):
            announcer.start()
        assert directory.asked == FIRST_TRIES
    announcer.close()


class RefusingPeers(PeerDirectory):
    """A directory that refuses every record, and knows the clocks `ahead_s` of peers."""

    def __init__(self, ahead_s: dict[str, float]) -> None:
        self.clocks = lambda: ahead_s

    def announce(self, record: Any, identity: Any) -> bool:
        return False


@pytest.mark.parametrize(
    ("ahead_s", "says", "own"),
    [
        ({"a": 7200.0}, "the clock of the peer at a is 7200 s ahead of the clock of this machine", False),
        ({"a": -7200.0, "b": 1.0, "c": -50.0}, "at a is 7200 s behind the clock of this machine: set that", False),
        ({"a": -7200.0, "b": -7209.0}, "the clocks of 2 other peers are 7209 s behind", True),
        ({"a": -7200.0, "b": 900.0}, "set the one that is wrong", False),
        ({"a": -50.0, "b": 2.0}, "give --key-file if others fill the directory", False),
        ({}, "give --key-file if others fill the directory", False),
    ],
)
def test_a_refused_record_blames_the_clock_that_is_known_to_be_wrong_and_once(
    ahead_s: dict[str, float], says: str, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RefusingPeers(ahead_s)
    announcer = Announcer(directory, cast(Any, None), lambda: cast(Any, 1.0))
    for _ in range(3):
        announcer.publish()
    assert len(caplog.messages) == 1
    assert says in caplog.text and ("set the clock of this machine" in caplog.text) == own
