"""The emulated network of the benchmarks; most tests need the rights to create network namespaces."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from benchmarks.netlab import Lab, LabError

WAIT_S = 10.0
SILENCE_S = 0.2


@contextmanager
def opened(*hosts: str) -> Iterator[Lab]:
    """A lab; skips the test if none can be opened."""
    with ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab(hosts))
        except LabError as error:
            pytest.skip(str(error))
        yield lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with opened("a", "b") as lab:
        yield lab


@contextmanager
def sockets(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A UDP socket of host a connected to one of host b, and the socket of host b."""
    with lab.inside("b"):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.inside("a"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((lab.address("b"), 0))
        sender.connect(receiver.getsockname())
        yield sender, receiver


def arrives(sender: socket.socket, receiver: socket.socket, within_s: float) -> bool:
    sender.send(b"packet")
    return bool(select.select([receiver], [], [], within_s)[0]) and receiver.recv(100) == b"packet"


@pytest.mark.parametrize("delay_ms", [0.0, 20.0, 50.0])
def test_no_packet_is_earlier_than_its_delay(lab: Lab, delay_ms: float) -> None:
    lab.delay("a", "b", delay_ms)
    took_ms: list[float] = []
    with sockets(lab) as (sender, receiver):
        for _ in range(5):
            began = time.perf_counter()
            assert arrives(sender, receiver, WAIT_S)
            took_ms.append((time.perf_counter() - began) * 1000)
    lab.delay("a", "b", None)
    assert min(took_ms) >= delay_ms
    assert min(took_ms) < delay_ms + 20.0, "a busy machine may be late, but not every time"


def test_cut_links_and_stopped_hosts_receive_nothing_until_healed(lab: Lab) -> None:
    with sockets(lab) as (sender, receiver):
        assert arrives(sender, receiver, WAIT_S)
        lab.cut("a", "b")
        assert not arrives(sender, receiver, SILENCE_S)
        lab.heal()
        assert arrives(sender, receiver, WAIT_S)
        lab.down("b")
        assert not arrives(sender, receiver, SILENCE_S)
        lab.up("b")
        assert arrives(sender, receiver, WAIT_S)


def test_a_link_with_total_loss_delivers_nothing(lab: Lab) -> None:
    with sockets(lab) as (sender, receiver):
        lab.loss("a", "b", 100.0)
        assert not arrives(sender, receiver, SILENCE_S)
        lab.loss("a", "b", None)
        assert arrives(sender, receiver, WAIT_S)


def test_a_program_belongs_to_its_host_and_ends_with_the_lab() -> None:
    with opened("a") as lab:
        sleeping = lab.run("a", ["sleep", "600"])
        with lab.inside("a"):
            listener = socket.create_server((lab.address("a"), 0))
        listener.close()
        assert sleeping.poll() is None
    assert sleeping.poll() is not None
    with pytest.raises(OSError):
        socket.create_server(("10.77.0.1", 0))


def test_invalid_labs_are_refused() -> None:
    with pytest.raises(LabError, match="same name"):
        Lab(["a", "a"])
    with pytest.raises(LabError, match="not open"):
        Lab(["a", "b"]).delay("a", "b", 1.0)
    with pytest.raises(LabError, match="has no host c"):
        Lab(["a", "b"]).delay("a", "c", 1.0)
    with pytest.raises(LabError, match="give 0 to 100"):
        Lab(["a", "b"]).loss("a", "b", 101.0)


def test_invalid_link_values_are_refused(lab: Lab) -> None:
    with pytest.raises(LabError):
        lab.delay("a", "b", -1.0)
