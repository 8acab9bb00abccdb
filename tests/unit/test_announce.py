"""How a peer's first record gets into the directory."""

from __future__ import annotations

from typing import Any, cast

import pytest

from peers.announce import FIRST_TRIES, Announcer
from splitnet.errors import DirectoryError


class LateDirectory:
    """Answers only after it was asked so often."""

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
    announcer = Announcer(
        cast(Any, directory), cast(Any, None), lambda: cast(Any, None), lambda: None, refresh_s=1000.0
    )
    if failures < FIRST_TRIES:
        announcer.start()
        assert directory.asked >= failures + 1
    else:
        with pytest.raises(DirectoryError):
            announcer.start()
        assert directory.asked == FIRST_TRIES
    announcer.close()
