"""Publishes the address to join a daemon with, on stdout and in a file that exists while the daemon serves.

Also handles the signals that stop a daemon.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from splitnet import process
from splitnet.errors import SplitnetError
from splitnet.process import ENDING, HANG_UP
from splitnet.transport.addresses import is_peer_address

_ON_THIS_MACHINE = re.compile(r"(tcp:/|/ip4)/127\.|(tcp://\[|/ip6/)::1\b")


def print_addresses(addresses: Sequence[str]) -> None:
    """Prints the address that other machines join with, and all other addresses dimmed.

    An address of a peer comes before addresses of the DHT, because other machines need the peer's port anyway.
    """

    def is_local(address: str) -> bool:
        return _ON_THIS_MACHINE.match(address) is not None

    first, *more = sorted(addresses, key=lambda address: (is_local(address), not is_peer_address(address)))
    typer.echo(f"others{' on this machine' * is_local(first)} join with\n  --join {quoted(first)}")
    for address in more:
        where = "on this machine" if is_local(address) else "or"
        node = "" if is_peer_address(address) else ", through the DHT"
        typer.secho(f"  {where}{node}: --join {quoted(address)}", dim=True)


def quoted(address: str) -> str:
    """An address, quoted because some shells expand question marks to file names."""
    return f'"{address}"' if "?" in address else address


@contextmanager
def published_address(addresses: Sequence[str], file: Path | None) -> Iterator[None]:
    """Prints the addresses, and keeps the first one in a file (written atomically) until the end of the `with`."""
    print_addresses(addresses)
    try:
        if file is not None:
            partial = file.with_name(f".{file.name}.{os.getpid()}")
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(addresses[0] + "\n", encoding="utf-8")
            partial.replace(file)
    except OSError as error:
        raise SplitnetError(f"cannot write the address to {file} ({error.strerror}): give another file") from None
    try:
        yield
    finally:
        forget_address(file)


def forget_address(file: Path | None) -> None:
    """Removes the file, which a killed daemon may have left."""
    try:
        if file is not None:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise SplitnetError(f"cannot replace {file} ({error.strerror}): give another --address-file") from None


# Duration of each wait in seconds. On Windows, handlers do not run while the main thread waits, so waits are short.
_LOOK_S = 0.5


class StopSignals:
    """Handles signals that end a process. After an instance has been created, these signals raise no exceptions.

    Until `raise_if_stopped` is first called, a signal ends the process at once. Later, the first signal ends
    `raise_if_stopped` and `wait`, and the second signal ends the process.
    """

    def __init__(self) -> None:
        self._number = 0
        self._may_end = True
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()  # signal handlers may put into a `SimpleQueue`
        for number in ENDING:
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:  # nohup sets SIG_IGN
                signal.signal(number, self._on_signal)

    def raise_if_stopped(self) -> None:
        """Raises SystemExit if a signal has arrived."""
        self._may_end = False
        if self._number:
            sys.exit(128 + self._number)

    def wait(self) -> None:
        """Returns after the first signal; the next one raises KeyboardInterrupt. Raises SystemExit after SIGHUP."""
        arrived = None
        while arrived is None:
            with suppress(queue.Empty):
                arrived = self._arrived.get(timeout=_LOOK_S)
        if arrived == HANG_UP:
            self.raise_if_stopped()
        for number in ENDING:
            signal.signal(number, signal.default_int_handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._may_end or self._number:
            process.kill_all()
            os._exit(128 + number)
        self._number = number
        self._arrived.put(number)
