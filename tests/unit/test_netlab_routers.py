"""Routers of the emulated network; the tests need the rights to create network namespaces."""

from __future__ import annotations

import os
import select
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import pytest

from benchmarks import nat_matrix
from benchmarks.netlab import NAMED, Lab, LabError, Router
from benchmarks.netlab.router import KINDS, Kind

WAIT_S = 10.0
SILENCE_S = 0.2
HOSTS = ("a", "twin", "b", "deep", "first", "second")
BEHIND = {"a": "home", "twin": "home", "b": "other", "deep": "inner", "inner": "home"}
ROUTERS = {"home": Router(protocols=("nat-pmp", "upnp")), "other": Router(), "inner": Router()}
Endpoint = tuple[str, int]
T = TypeVar("T")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab(HOSTS, routers=ROUTERS, behind=BEHIND))
        except LabError as error:
            pytest.skip(str(error))
        yield lab


@contextmanager
def udp(lab: Lab, *hosts: str) -> Iterator[list[socket.socket]]:
    """A UDP socket in each host, bound to its own port."""
    opened = [inside(lab, host, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for host in hosts]
    try:
        for one, host in zip(opened, hosts, strict=True):
            one.bind((lab.address(host), 0))
            one.settimeout(WAIT_S)
        yield opened
    finally:
        for one in opened:
            one.close()


def inside(lab: Lab, host: str, do: Callable[[], T]) -> T:
    with lab.inside(host):
        return do()


def seen(sender: socket.socket, receiver: socket.socket) -> Endpoint:
    """The source endpoint of a packet, as the receiver sees it. A packet may be lost right after many others."""
    sender.sendto(b"look", receiver.getsockname())
    try:
        message, endpoint = receiver.recvfrom(100)
    except TimeoutError:
        sender.sendto(b"look", receiver.getsockname())
        message, endpoint = receiver.recvfrom(100)
    assert message == b"look"
    return endpoint


def passes(
    lab: Lab, sender: socket.socket, endpoint: Endpoint, receiver: socket.socket, permitted: socket.socket
) -> bool:
    """Whether a packet of a public host passes a router: a packet that passes arrives before a later packet of
    `permitted`, which the router lets through.

    Packets of a host stay in order: when a second packet arrives at a neighbour, the router has decided on the first.
    """
    sender.sendto(b"asked", endpoint)
    with udp(lab, "second" if sender.getsockname()[0] == lab.address("first") else "first") as (neighbour,):
        seen(sender, neighbour)
    permitted.sendto(b"permitted", endpoint)
    arrived = [receiver.recv(100)]
    while arrived[-1] != b"permitted":
        arrived.append(receiver.recv(100))
    assert arrived in ([b"permitted"], [b"asked", b"permitted"])
    return len(arrived) == 2


@pytest.mark.parametrize("random_ports", [False, True])
@pytest.mark.parametrize("mapping", KINDS)
def test_the_mapping_decides_which_hosts_see_the_same_public_port(lab: Lab, mapping: Kind, random_ports: bool) -> None:
    lab.configure("home", Router(mapping=mapping, random_ports=random_ports))
    with udp(lab, "a", "first", "first", "second") as (a, first, same_host, second):
        endpoints = [seen(a, remote) for remote in (first, same_host, second)]
        assert {address for address, _ in endpoints} == {lab.public_address("a")}
        ports = [port for _, port in endpoints]
        assert (ports[0] == a.getsockname()[1]) is not random_ports
        assert (ports[1] == ports[0]) is (mapping != "address-and-port")
        assert (ports[2] == ports[0]) is (mapping == "independent")
        assert [seen(a, remote)[1] for remote in (first, same_host, second)] == ports


@pytest.mark.parametrize("filtering", KINDS)
@pytest.mark.parametrize("mapping", KINDS)
def test_the_filter_decides_which_hosts_may_send_to_a_public_port(lab: Lab, mapping: Kind, filtering: Kind) -> None:
    lab.configure("home", Router(mapping=mapping, filtering=filtering))
    with udp(lab, "a", "first", "first", "second") as (a, first, same_host, second):
        endpoint = seen(a, first)
        assert passes(lab, same_host, endpoint, a, first) is (filtering != "address-and-port")
        assert passes(lab, second, endpoint, a, first) is (filtering == "independent")


def test_an_answer_leaves_from_the_port_of_the_request(lab: Lab) -> None:
    lab.configure("home", Router(mapping="address-and-port", filtering="independent"))
    with udp(lab, "a", "first", "second") as (a, first, second):
        endpoint = seen(a, first)
        assert passes(lab, second, endpoint, a, first)
        assert seen(a, second) == endpoint


def test_two_hosts_with_the_same_port_have_different_public_ones(lab: Lab) -> None:
    lab.configure("home", Router())
    with udp(lab, "a", "twin", "first") as (a, _, first):
        twin = inside(lab, "twin", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with twin:
            twin.bind((lab.address("twin"), a.getsockname()[1]))
            endpoints = [seen(a, first), seen(twin, first)]
            assert endpoints[0] != endpoints[1]
            twin.settimeout(WAIT_S)
            for one, endpoint in zip((a, twin), endpoints, strict=True):
                first.sendto(endpoint[1].to_bytes(2), endpoint)
                assert one.recv(100) == endpoint[1].to_bytes(2)


def test_checksums_stay_correct(lab: Lab) -> None:
    """The receiving kernel drops packets with a wrong checksum."""
    lab.configure("home", Router(random_ports=True))
    with udp(lab, "first") as (first,):
        for size in range(0, 1400, 7):
            with udp(lab, "a") as (a,):
                if size % 5 == 0:
                    a.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
                data = os.urandom(size)
                a.sendto(data, first.getsockname())
                message, endpoint = first.recvfrom(2000)
                assert message == data
                first.sendto(data[::-1], endpoint)
                assert a.recv(2000) == data[::-1]


def test_mappings_expire(lab: Lab) -> None:
    lab.configure("home", Router(udp_idle_s=SILENCE_S / 2, random_ports=True))
    with udp(lab, "a", "first") as (a, first):
        endpoint = seen(a, first)
        assert not select.select([a], [], [], SILENCE_S)[0]
        first.sendto(b"late", endpoint)
        assert not select.select([a], [], [], SILENCE_S)[0]
        assert seen(a, first) != endpoint


def test_idle_mappings_expire_by_protocol(lab: Lab) -> None:
    lab.configure("home", Router(udp_idle_s=1000.0, tcp_idle_s=SILENCE_S / 2))
    with udp(lab, "a", "first") as (a, first), tcp(lab, "a", "first") as (calling, answering, _):
        endpoint = seen(a, first)
        assert not select.select([calling], [], [], SILENCE_S)[0]
        answering.send(b"late")
        assert not select.select([calling], [], [], SILENCE_S)[0]
        first.sendto(b"not late", endpoint)
        assert a.recv(100) == b"not late"


@contextmanager
def tcp(lab: Lab, caller: str, listener: str) -> Iterator[tuple[socket.socket, socket.socket, Endpoint]]:
    """A connection: both ends, and the caller's endpoint as the listener sees it. The caller may reuse its port."""
    listening = inside(lab, listener, lambda: socket.create_server((lab.address(listener), 0)))
    with listening, inside(lab, caller, lambda: nat_matrix.reusable((lab.address(caller), 0))) as calling:
        calling.settimeout(WAIT_S)
        calling.connect(listening.getsockname())
        answering, endpoint = listening.accept()
        with answering:
            yield calling, answering, endpoint


def connects(lab: Lab, host: str, endpoint: Endpoint, wait_s: float = WAIT_S) -> bool:
    try:
        inside(lab, host, lambda: socket.create_connection(endpoint, wait_s)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_connection_out_carries_data_both_ways(lab: Lab) -> None:
    lab.configure("home", Router())
    data = os.urandom(1 << 20)
    with tcp(lab, "a", "first") as (calling, answering, endpoint):
        assert endpoint[0] == lab.public_address("a") != lab.address("a")
        for sender, receiver in ((calling, answering), (answering, calling)):
            receiver.settimeout(WAIT_S)
            for start in range(0, len(data), 1 << 14):
                sender.sendall(data[start : start + (1 << 14)])
                received = b""
                while len(received) < 1 << 14:
                    received += receiver.recv(1 << 14)
                assert received == data[start : start + (1 << 14)]


@pytest.mark.parametrize("filtering", KINDS)
def test_the_filter_decides_which_hosts_may_connect_to_a_public_port(lab: Lab, filtering: Kind) -> None:
    lab.configure("home", Router(filtering=filtering, reset=True))
    with (
        tcp(lab, "a", "first") as (calling, _, endpoint),
        inside(lab, "a", lambda: nat_matrix.reusable(calling.getsockname())) as listening,
    ):
        listening.listen()
        assert connects(lab, "first", endpoint) is (filtering != "address-and-port")
        assert connects(lab, "second", endpoint) is (filtering == "independent")


def test_a_filtered_connection_attempt_gets_no_answer(lab: Lab) -> None:
    lab.configure("home", Router())
    with pytest.raises(TimeoutError):
        connects(lab, "first", (lab.public_address("a"), 4000), SILENCE_S)


def test_only_an_outgoing_syn_makes_a_tcp_mapping(lab: Lab) -> None:
    lab.configure("home", Router())
    with tcp(lab, "a", "first") as (calling, answering, _):
        lab.configure("home", Router())  # The router loses its mappings.
        calling.send(b"lost")
        assert not select.select([answering], [], [], SILENCE_S)[0]


@pytest.mark.parametrize("hairpin", [False, True])
def test_hosts_behind_one_router_reach_each_other_at_its_public_address(lab: Lab, hairpin: bool) -> None:
    lab.configure("home", Router(filtering="independent", hairpin=hairpin))
    with udp(lab, "a", "twin", "first") as (a, twin, first):
        endpoint = seen(a, first)
        twin_endpoint = seen(twin, first)
        twin.sendto(b"public", endpoint)
        twin.sendto(b"private", a.getsockname())
        arrived = [a.recvfrom(100)]
        while arrived[-1][0] != b"private":
            arrived.append(a.recvfrom(100))
        assert (b"private", twin.getsockname()) in arrived
        assert ((b"public", twin_endpoint) in arrived) is hairpin


def test_a_forwarded_port_leads_to_its_host(lab: Lab) -> None:
    lab.configure("home", Router(reset=True))
    endpoint = (lab.public_address("a"), 7000)
    listening = inside(lab, "a", lambda: socket.create_server((lab.address("a"), 7001)))
    with listening:
        assert not connects(lab, "second", endpoint)
        lab.forward("home", "tcp", 7000, "a", 7001)
        with inside(lab, "second", lambda: socket.create_connection(endpoint, WAIT_S)) as calling:
            answering, caller = listening.accept()
            with answering:
                assert caller == calling.getsockname()
                answering.send(b"here")
                assert calling.recv(100) == b"here"
        lab.unforward("home", "tcp", 7000)
        assert not connects(lab, "second", endpoint)


def test_a_forwarded_port_is_mapped_for_its_host_only(lab: Lab) -> None:
    lab.configure("home", Router())
    with udp(lab, "a", "first") as (a, first), udp(lab, "twin") as (twin,):
        port = twin.getsockname()[1]
        lab.forward("home", "udp", port, "a", a.getsockname()[1])
        assert seen(a, first)[1] == port
        assert seen(twin, first)[1] != port
        lab.unforward("home", "udp", port)


def test_a_full_table_drops_the_mapping_that_expires_first(lab: Lab) -> None:
    lab.configure("home", Router())
    with udp(lab, "a", "first", "second") as (a, first, second):
        endpoint = seen(a, first)
        for port in range(20000, 20000 + 1023):
            a.sendto(b"", (lab.address("first"), port))  # The host answers each packet with an ICMP error.
        first.sendto(b"known", endpoint)
        assert a.recv(100) == b"known"
        for port in range(21023, 21023 + 1023):
            a.sendto(b"", (lab.address("first"), port))
        seen(a, second)
        assert not passes(lab, first, endpoint, a, second)


def test_a_connection_to_a_closed_port_is_refused(lab: Lab) -> None:
    lab.configure("home", Router())
    assert not connects(lab, "a", (lab.address("first"), 9))


def test_a_router_may_be_behind_another_router(lab: Lab) -> None:
    lab.configure("home", Router())
    lab.configure("inner", Router())
    with tcp(lab, "deep", "first") as (calling, answering, endpoint):
        assert endpoint[0] == lab.public_address("deep") == lab.public_address("home")
        answering.send(b"down")
        assert calling.recv(100) == b"down"


@pytest.mark.full
@pytest.mark.parametrize(("kind", "opens"), [("port-restricted", True), ("symmetric", False)])
def test_simultaneous_open_works_through_port_restricted_routers_only(lab: Lab, kind: str, opens: bool) -> None:
    for router in ("home", "other"):
        lab.configure(router, NAMED[kind])
    assert nat_matrix.both_call(lab, "a", "b", "first") is opens


def ask_nat_pmp(lab: Lab, request: bytes) -> bytes:
    with udp(lab, "a") as (a,):
        a.sendto(request, (lab.address("home"), 5351))
        answer = a.recv(100)
    assert answer[:2] == bytes([0, 128 + request[1]])
    return answer


def test_nat_pmp_forwards_a_port(lab: Lab) -> None:
    lab.configure("home", Router(reset=True))
    assert ask_nat_pmp(lab, bytes(2))[8:] == socket.inet_aton(lab.public_address("a"))
    with inside(lab, "a", lambda: socket.create_server((lab.address("a"), 0))) as listening:
        port = listening.getsockname()[1]
        answer = ask_nat_pmp(lab, struct.pack("!BBHHHI", 0, 2, 0, port, 8000, 60))
        result, _, inner, outer, lifetime_s = struct.unpack("!HIHHI", answer[2:])
        assert (result, inner, outer, lifetime_s) == (0, port, 8000, 60)
        assert connects(lab, "second", (lab.public_address("a"), outer))
        assert struct.unpack("!HIHHI", ask_nat_pmp(lab, struct.pack("!BBHHHI", 0, 2, 0, port, 0, 0))[2:])[0] == 0
        assert not connects(lab, "second", (lab.public_address("a"), outer))
    assert ask_nat_pmp(lab, bytes([2, 0]))[3] == 1, "version 2 is PCP, which the router does not speak"
    assert ask_nat_pmp(lab, bytes([0, 9]))[3] == 5


@pytest.mark.full
def test_a_lease_of_nat_pmp_expires(lab: Lab) -> None:
    lab.configure("home", Router(reset=True))
    with inside(lab, "a", lambda: socket.create_server((lab.address("a"), 0))) as listening:
        ask_nat_pmp(lab, struct.pack("!BBHHHI", 0, 2, 0, listening.getsockname()[1], 8001, 2))
        endpoint = (lab.public_address("a"), 8001)
        assert connects(lab, "second", endpoint)
        listening.accept()[0].close()
        while connects(lab, "second", endpoint):
            listening.accept()[0].close()


def call_igd(lab: Lab, control: str, action: str, **values: object) -> str:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    service = "urn:schemas-upnp-org:service:WANIPConnection:1"
    body = (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        f'<u:{action} xmlns:u="{service}">{inner}</u:{action}></s:Body></s:Envelope>'
    )
    request = urllib.request.Request(control, body.encode(), {"SOAPAction": f'"{service}#{action}"'})
    try:
        with inside(lab, "a", lambda: urllib.request.urlopen(request, timeout=WAIT_S)) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def test_upnp_forwards_a_port(lab: Lab) -> None:
    lab.configure("home", Router(reset=True))
    with udp(lab, "a") as (a,):
        wanted = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
        head = 'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1'
        a.sendto(f"{head}\r\nST: {wanted}\r\n\r\n".encode(), ("239.255.255.250", 1900))
        lines = a.recv(2000).decode().split("\r\n")
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert fields["ST"] == wanted
    with inside(lab, "a", lambda: urllib.request.urlopen(fields["LOCATION"], timeout=WAIT_S)) as answer:
        description = answer.read().decode()
    path = description.partition("<controlURL>")[2].partition("</controlURL>")[0]
    control = fields["LOCATION"].removesuffix("/description") + path
    assert f">{lab.public_address('a')}<" in call_igd(lab, control, "GetExternalIPAddress")
    with inside(lab, "a", lambda: socket.create_server((lab.address("a"), 0))) as listening:
        mapping = {
            "NewExternalPort": 8002,
            "NewProtocol": "TCP",
            "NewInternalPort": listening.getsockname()[1],
            "NewInternalClient": lab.address("a"),
            "NewEnabled": 1,
            "NewLeaseDuration": 0,
        }
        endpoint = (lab.public_address("a"), 8002)
        assert "Fault" not in call_igd(lab, control, "AddPortMapping", **mapping)
        assert connects(lab, "second", endpoint)
        stolen = call_igd(lab, control, "AddPortMapping", **(mapping | {"NewInternalClient": lab.address("twin")}))
        assert "<errorCode>606</errorCode>" in stolen
        conflict = call_igd(lab, control, "AddPortMapping", **(mapping | {"NewInternalPort": 1}))
        assert "<errorCode>718</errorCode>" in conflict
        assert "<errorCode>726<" in call_igd(lab, control, "AddPortMapping", **mapping, NewRemoteHost="10.77.0.6")
        with pytest.raises(LabError, match="forwarded already"):
            lab.forward("home", "tcp", 8002, "twin", 1)
        assert "Fault" not in call_igd(lab, control, "DeletePortMapping", NewExternalPort=8002, NewProtocol="TCP")
        assert not connects(lab, "second", endpoint)
        assert "<errorCode>714</errorCode>" in call_igd(
            lab, control, "DeletePortMapping", NewExternalPort=8002, NewProtocol="TCP"
        )


def test_a_router_can_be_cut_off_and_stopped(lab: Lab) -> None:
    lab.configure("home", Router())
    with udp(lab, "a", "first") as (a, first):
        seen(a, first)
        lab.cut("home", "first")
        a.sendto(b"lost", first.getsockname())
        assert not select.select([first], [], [], SILENCE_S)[0]
        lab.heal()
        lab.down("home")
        a.sendto(b"lost", first.getsockname())
        assert not select.select([first], [], [], SILENCE_S)[0]
        lab.heal()
        seen(a, first)
    with pytest.raises(LabError, match="name home and first instead"):
        lab.delay("a", "first", 1.0)
    with pytest.raises(LabError, match="name inner and home instead"):
        lab.cut("deep", "home")


def test_addresses_are_those_seen_from_each_host(lab: Lab) -> None:
    assert lab.address("a") == lab.address("b") == "192.168.1.2", "homes are alike"
    assert lab.address("home") == "192.168.1.1"
    assert lab.public_address("first") == lab.address("first") == "10.77.0.5"
    assert lab.address_from("a", "twin") == lab.address("twin") == "192.168.1.3"
    assert lab.address_from("a", "home") == lab.address_from("home", "home") == "192.168.1.1"
    assert lab.address_from("a", "inner") == "192.168.1.4"
    assert lab.address_from("a", "b") == lab.public_address("b")
    assert lab.address_from("first", "a") == lab.public_address("a")
    assert lab.address_from("deep", "a") == lab.public_address("a"), "networks behind routers share addresses"


def test_invalid_routers_are_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="not a router of the lab"):
        Lab(["a"], behind={"a": "home"})
    with pytest.raises(LabError, match="same name"):
        Lab(["a"], routers={"a": Router()})
    with pytest.raises(LabError, match="is called cone"):
        Router(mapping="cone")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LabError, match="does not speak pcp"):
        Router(protocols=("pcp",))
    with pytest.raises(LabError, match="in a circle"):
        Lab(["a"], routers={"x": Router(), "y": Router()}, behind={"x": "y", "y": "x"})
    with pytest.raises(LabError, match="not behind the router"):
        lab.forward("home", "tcp", 1, "b", 1)
    with pytest.raises(LabError, match="no such"):
        lab.forward("home", "tcp", 70000, "a", 1)
    with pytest.raises(LabError, match="not forwarded"):
        lab.unforward("home", "udp", 9)
    with pytest.raises(LabError, match="tcp or udp"):
        lab.forward("home", "sctp", 1, "a", 1)
