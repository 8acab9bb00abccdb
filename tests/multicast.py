"""Local networks for tests, invisible from outside."""

from __future__ import annotations

import ipaddress
import secrets
import socket

import ifaddr
import pytest

from splitnet.directory import mdns

LOOPBACK = "127.0.0.1"


def use_network_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes services discoverable on loopback only, under a name that no other test run uses; skips if that fails."""
    if not _carries_multicast():
        pytest.skip("loopback carries no multicast here")
    monkeypatch.setattr(mdns, "SERVICE_TYPE", f"_sn{secrets.token_hex(4)}._tcp.local.")
    monkeypatch.setattr(mdns, "_own_addresses", lambda: [LOOPBACK])


def lan_host() -> str:
    """An address of this machine on a local network; skips if there is none."""
    own = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    found = [address for address in own if mdns._is_local(ipaddress.IPv4Address(address))]
    if not found:
        pytest.skip("this machine is not on a local network")
    return found[0]


def _carries_multicast() -> bool:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.bind(("", 0))
            group = socket.inet_aton("224.0.0.251") + socket.inet_aton(LOOPBACK)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
            sender.sendto(b"?", ("224.0.0.251", receiver.getsockname()[1]))
            receiver.settimeout(2.0)
            return receiver.recv(1) == b"?"
        except OSError:
            return False
