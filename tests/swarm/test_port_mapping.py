"""Port mapping: ports are opened, renewed and closed, and announced if others reach them; false answers do no harm."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import netlab
from peers.running_peer import RunningPeer
from splitnet.directory.record import PeerRecord
from splitnet.nat import port_mapping, upnp
from splitnet.nat.port_mapping import MappingError, PortMapping, look_for_router
from splitnet.nat.punch import PathKind
from splitnet.security.identity import Identity
from splitnet.swarm.trial import PeerLinks
from splitnet.tools.doctor.examination import AddressChecks
from splitnet.tools.doctor.machine_checks import Status, failed
from splitnet.wire.endpoints import LinkState
from tests.swarm.harness import local_swarm, wait_until

pytestmark = pytest.mark.swarm

ANY = "tcp://0.0.0.0:0"
PORT = 4001


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, *protocols: str, **router: Any) -> netlab.Lab:
    """A lab with a home network, and two public hosts."""
    for protocol in protocols:
        if protocol == "upnp":
            pytest.importorskip("miniupnpc")
    routers = {"router": netlab.Router(protocols=protocols, **router)}
    lab = netlab.Lab(
        ["home", "sofa", "one", "two"],
        routers=routers,
        behind=dict.fromkeys(("home", "sofa"), "router"),
        public="44.77.0",
    )
    try:
        return stack.enter_context(lab)
    except netlab.LabError as error:
        pytest.skip(str(error))


def is_connected(lab: netlab.Lab, address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with lab.inside("one"), closing(socket.socket()) as calling:
        calling.settimeout(0.5)
        return calling.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("protocol", ["nat-pmp", "upnp"])
def test_a_port_is_opened_renewed_and_given_back(
    stack: ExitStack, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = opened(stack, protocol)
    with lab.inside("home"):
        stack.enter_context(socket.create_server(("", PORT)))
        kept = PortMapping(PORT)
        address = kept.request_port()
        assert address == f"tcp://{lab.public_address('home')}:{PORT}"
        assert kept.by.lower() == protocol
        assert is_connected(lab, address)
        lab.unforward("router", "tcp", PORT)
        assert kept.renew() == address and not is_connected(lab, address), "it was renewed before it was time to"
        monkeypatch.setattr(kept, "_renew_at", 0.0)
        assert kept.renew() == address and is_connected(lab, address)
        assert kept._renew_at > 0
        with lab.inside("sofa"):  # another host of the home network asks for the same port
            other = PortMapping(PORT)
            assert other.request_port() != address
            other.close()
        assert is_connected(lab, address)
        kept.close()
        assert not is_connected(lab, address)
        kept.close()


def test_without_a_router_that_maps_ports_the_error_names_the_attempts(stack: ExitStack) -> None:
    lab = opened(stack)
    with lab.inside("home"), pytest.raises(MappingError, match="NAT-PMP: the router does not support it; UPnP: "):
        PortMapping(PORT).request_port()
    lab = opened(stack, "nat-pmp")
    with lab.inside("home"):
        assert look_for_router() == f"{lab.public_address('home')} (NAT-PMP)"
        reach = AddressChecks(Identity.generate(), ANY, None, needed=True)
        (found,) = reach.router(failed("reach", ""))
        assert found.status is Status.passed and lab.public_address("home") in found.text
    assert not lab._gateways[0]._leases


OK = struct.pack("!BBHI", 0, 128, 0, 1) + socket.inet_aton("44.77.0.1")


def given(inside: int = PORT, outside: int = 9, seconds: int = 60, result: int = 0) -> bytes:
    return struct.pack("!BBHIHHI", 0, 130, result, 1, inside, outside, seconds)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (b"", b""),
        (bytes(64), given()),
        (OK[:-1], given()),
        (OK[:8] + bytes(4), given()),
        (OK[:8] + b"\x7f\0\0\1", given()),
        (OK, given(inside=5)),
        (OK, given(outside=0)),
        (OK, given(seconds=0)),
        (OK, given(result=2)),
        (OK, given(result=999)),
        (OK, given()[:-4]),
        (OK, OK),
    ],
)
def test_a_router_that_lies_or_refuses(first: bytes, second: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_mapping, "_WAITS_S", (0.05,))
    monkeypatch.setattr(port_mapping, "default_gateway", lambda: "127.0.0.1")
    monkeypatch.setattr(port_mapping, "find_spec", lambda name: None)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as router:
        router.bind(("127.0.0.1", 0))
        monkeypatch.setattr(port_mapping, "NAT_PMP_PORT", router.getsockname()[1])

        def answer() -> None:
            for _ in range(2):
                request, sender = router.recvfrom(64)
                if not request:
                    return
                router.sendto(second if request[1] else first, sender)

        answering = threading.Thread(target=answer)
        answering.start()
        kept = PortMapping(PORT)
        with pytest.raises(MappingError, match="UPnP: the package miniupnpc is not installed"):
            kept.request_port()
        assert kept.mapped is None
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as ending:
            ending.sendto(b"", router.getsockname())
        answering.join()


@pytest.mark.parametrize("told", [b"", b"[]", b'["x", 1]', b'["0.0.0.0", 1]', b"{}", b'["44.77.0.1", 65536]', None])
def test_a_router_that_lies_by_upnp_or_hangs(told: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise MappingError("none")

    def run(command: list[str], **options: Any) -> Any:
        if told is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 0, told, b"")

    monkeypatch.setattr(port_mapping, "default_gateway", lambda: "192.0.2.1")
    monkeypatch.setattr(port_mapping, "_nat_pmp", refuse)
    monkeypatch.setattr(port_mapping, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MappingError, match="UPnP: "):
        PortMapping(PORT).request_port()


def test_upnp_requests_are_sent_only_to_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to another address could reach services that only listen for this machine."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as router, ExitStack() as others:
        router.bind(("127.0.0.1", 0))
        monkeypatch.setattr(upnp, "GROUP", "127.0.0.1")
        monkeypatch.setattr(upnp, "PORT", router.getsockname()[1])
        stranger = others.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        stranger.bind(("127.0.0.2", 0))

        def answer() -> None:
            _, asking = router.recvfrom(2048)
            stranger.sendto(b"HTTP/1.1 200 OK\r\nLOCATION: http://127.0.0.1:80/secret\r\n\r\n", asking)
            stranger.sendto(b"HTTP/1.1 200 OK\r\nLOCATION: http://127.0.0.2:80/secret\r\n\r\n", asking)
            for text in (
                "",
                "http://127.0.0.2:80/x",
                "http://127.0.0.1@127.0.0.2/x",
                "file:///x",
                "http://[",
                "//127.0.0.1/x",
            ):
                router.sendto(f"HTTP/1.1 200 OK\r\nLOCATION: {text}\r\n\r\n".encode(), asking)
            router.sendto(b"HTTP/1.1 200 OK\r\nlocation:http://127.0.0.1:49152/d.xml \r\n\r\n", asking)

        answering = threading.Thread(target=answer)
        answering.start()
        assert upnp.find_description("127.0.0.1") == "http://127.0.0.1:49152/d.xml"
        answering.join()


@pytest.mark.parametrize(
    ("told", "gateway"),
    [
        ("   route to: default\n    gateway: 192.168.7.1\n  interface: en0\n", "192.168.7.1"),
        ("Netzwerkziel\n          0.0.0.0          0.0.0.0      10.0.0.138      10.0.0.5     25\n", "10.0.0.138"),
        ("nothing of that kind", None),
    ],
)
def test_the_router_is_found_where_there_is_no_proc(
    told: str, gateway: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_mapping.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, told, ""))
    if gateway is None:
        with pytest.raises(MappingError, match="no default route"):
            port_mapping.default_gateway()
    else:
        assert port_mapping.default_gateway() == gateway


class Home:
    """A peer at home behind a router, and a public peer that tests whether it is reachable, and is its relay."""

    def __init__(self, stack: ExitStack, lab: netlab.Lab, folder: Path) -> None:
        self.lab = lab
        self._stack = stack
        self._swarm = stack.enter_context(local_swarm(folder, []))
        self.public = self._peer("one", 0, 6, relay_port=0)
        self.peer = self._peer("home", 0, 3, join=[self.public.join_address], relay_port=0)
        self.mapped = f"tcp://{self.lab.public_address('home')}:{self.peer.transport.port}"

    def _peer(self, host: str, start: int, end: int, **options: Any) -> RunningPeer:
        with self.lab.inside(host):
            peer = self._swarm.add(start, end, listen=f"tcp://{self.lab.address(host)}:0", **options)
        self._stack.callback(self.inside, host, peer.close)  # its requests to the router stay in the lab
        return peer

    def inside(self, host: str, do: Callable[[], Any]) -> None:
        with self.lab.inside(host):
            do()

    def announced(self) -> PeerRecord | None:
        return next((record for record in self.public._others() if record.key == self.peer.identity.public), None)

    def way_from(self, host: str) -> PathKind:
        record = self.announced()
        assert record is not None
        with self.lab.inside(host), PeerLinks(Identity.generate()) as asking:
            answer = asking.try_out({record.endpoint})[record.endpoint]
        assert answer.state is LinkState.UP
        return answer.path_kind


@pytest.mark.default_cases(hairpin=(True,))
@pytest.mark.parametrize("hairpin", [True, False])
def test_a_mapped_port_is_announced_once_others_reach_it(
    stack: ExitStack, folder: Path, hairpin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = opened(stack, "nat-pmp", hairpin=hairpin)
    home = Home(stack, lab, folder)

    def is_told() -> bool:
        record = home.announced()
        return record is not None and record.address == home.mapped and bool(record.relays) != hairpin

    wait_until(is_told)
    record = home.announced()
    assert record is not None and record.helper is None, "the router leads no other port there"
    assert home.way_from("two") is PathKind.DIRECT
    assert (home.way_from("sofa") is PathKind.DIRECT) == hairpin  # otherwise through the public relay at first
    lab.unforward("router", "tcp", home.peer.transport.port)  # as when a router restarts
    ways, said = home.peer.paths, [False]  # the router still passes open connections
    ask = ways._is_reached
    monkeypatch.setattr(ways, "_is_reached", lambda address: said.pop() if said else ask(address))
    ways._ask_at = 0.0
    home.inside("home", ways.check_reachability)
    assert is_connected(lab, home.mapped) and home.peer.paths.address == home.mapped
    home.inside("home", home.peer.close)
    assert not lab._gateways[0]._leases


@pytest.mark.full
def test_a_port_that_is_not_reached_is_not_announced(
    stack: ExitStack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies: list[str] = []
    opens = PortMapping.request_port

    def lie(kept: PortMapping) -> str:
        opens(kept)
        lies.append("tcp://44.77.0.99:80")
        return lies[-1]

    monkeypatch.setattr(PortMapping, "request_port", lie)
    lab = opened(stack, "nat-pmp")
    home = Home(stack, lab, folder)

    def has_helper() -> bool:
        record = home.announced()
        return record is not None and bool(record.relays)

    wait_until(lambda: lies and has_helper())
    wait_until(lambda: not lab._gateways[0]._leases)
    record = home.announced()
    assert record is not None and record.address == home.peer.endpoint.address
    assert home.way_from("two") is not PathKind.DIRECT
