"""Lets hosts of a lab request forwarded ports of their router: by NAT-PMP (RFC 6886) and UPnP
(InternetGatewayDevice:1)."""

from __future__ import annotations

import http.server
import select
import socket
import struct
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.netlab.errors import LabError

ADDRESS = "192.168.1.1"
"""The router's address for hosts behind it."""
NAT_PMP_PORT = 5351
SSDP_GROUP, SSDP_PORT = "239.255.255.250", 1900
_TICK_S = 0.1
_NAT_PMP_OPCODES = {1: "udp", 2: "tcp"}
_OK, _UNSUPPORTED_VERSION, _NOT_AUTHORIZED, _OUT_OF_RESOURCES, _UNSUPPORTED_OPCODE = 0, 1, 2, 4, 5
_DEVICE = "urn:schemas-upnp-org:device:"
_SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
_DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion><device>
<deviceType>{_DEVICE}InternetGatewayDevice:1</deviceType><friendlyName>netlab</friendlyName><UDN>uuid:netlab</UDN>
<deviceList><device><deviceType>{_DEVICE}WANDevice:1</deviceType><UDN>uuid:netlab-wan</UDN>
<deviceList><device><deviceType>{_DEVICE}WANConnectionDevice:1</deviceType><UDN>uuid:netlab-connection</UDN>
<serviceList><service><serviceType>{_SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<SCPDURL>/service</SCPDURL><controlURL>/control</controlURL><eventSubURL>/events</eventSubURL></service></serviceList>
</device></deviceList></device></deviceList></device></root>"""
_ENVELOPE = """<?xml version="1.0"?>
<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"
 s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>{}</s:Body></s:Envelope>"""
_FAULT = """<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>
<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{}</errorCode><errorDescription>{}</errorDescription>
</UPnPError></detail></s:Fault>"""


class Refused(Exception):
    """The reason why a port is not forwarded, as an error of UPnP: its code and description."""


@dataclass(frozen=True)
class Lease:
    """A forwarded port: its host, and the time of its end on `time.monotonic()`; 0: no end."""

    client: str
    port: int
    until: float


class Gateway:
    """Forwards ports on request of hosts. Create and close it while the lab is open.

    The calling thread opens the sockets and must be inside the router.

    Args:
        public: the router's public address.
        hosts: the names of the hosts behind the router, by address; a host may request ports only for itself.
        forward, unforward: the methods of the lab, without the argument for the router's name.
        protocols: `nat-pmp`, `upnp`, or both.
    """

    def __init__(
        self,
        public: str,
        hosts: Mapping[str, str],
        forward: Callable[[str, int, str, int], None],
        unforward: Callable[[str, int], None],
        protocols: Collection[str],
    ) -> None:
        self._public = public
        self._hosts = hosts
        self._forward = forward
        self._unforward = unforward
        self._began = time.monotonic()
        self._leases: dict[tuple[str, int], Lease] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._answers: dict[socket.socket, Callable[[bytes, str], bytes | None]] = {}
        self._http: http.server.ThreadingHTTPServer | None = None
        if "nat-pmp" in protocols:
            self._answers[_udp(ADDRESS, NAT_PMP_PORT)] = self._answer_nat_pmp
        threads = [threading.Thread(target=self._serve, name="gateway")]
        if "upnp" in protocols:
            ssdp = _udp("", SSDP_PORT)
            group = socket.inet_aton(SSDP_GROUP) + socket.inet_aton(ADDRESS)
            ssdp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            self._answers[ssdp] = self._answer_ssdp
            self._http = _http_server(self)
            threads.append(threading.Thread(target=self._http.serve_forever, args=(_TICK_S,), name="gateway-http"))
        self._threads = threads
        for thread in threads:
            thread.start()

    def close(self) -> None:
        """Stops answering. Forwarded ports stay forwarded."""
        self._ended.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        for thread in self._threads:
            thread.join()
        for answering in self._answers:
            answering.close()

    def lease(self, protocol: str, public_port: int, client: str, port: int, lifetime_s: float) -> None:
        """Forwards a port to the host that asks for it, for some seconds; 0: no end.

        Raises:
            Refused: the port belongs to another host, or the router cannot forward it.
        """
        if client not in self._hosts or protocol not in ("tcp", "udp"):
            raise Refused(606, "Action not authorized")
        with self._lock:
            lease = self._leases.get((protocol, public_port))
            if lease is not None and (lease.client, lease.port) != (client, port):
                raise Refused(718, "ConflictInMappingEntry")
            try:
                self._forward(protocol, public_port, self._hosts[client], port)
            except LabError:  # the lab's user has forwarded this port, or too many ports are forwarded
                raise Refused(718, "ConflictInMappingEntry") from None
            until = time.monotonic() + lifetime_s if lifetime_s else 0.0
            self._leases[protocol, public_port] = Lease(client, port, until)

    def release(self, protocol: str, public_port: int, client: str) -> None:
        """Ends the forwarding of a port for a host.

        Raises:
            Refused: the host has no such port.
        """
        with self._lock:
            lease = self._leases.get((protocol, public_port))
            if lease is None or lease.client != client:
                raise Refused(714, "NoSuchEntryInArray")
            self._end(protocol, public_port)

    def find(self, protocol: str, client: str, port: int) -> list[int]:
        """The public ports that lead to a port of a host; with port 0, to any of its ports."""
        with self._lock:
            leases = self._leases.items()
            return [
                public_port
                for (of, public_port), lease in leases
                if of == protocol and lease.client == client and port in (0, lease.port)
            ]

    def act(self, action: str, said: Mapping[str, str], client: str) -> Mapping[str, str]:
        """Performs an action of UPnP's WANIPConnection:1.

        Raises:
            Refused: the action is impossible.
        """
        protocol = said.get("NewProtocol", "").lower()
        try:
            public_port = int(said.get("NewExternalPort", "0"))
            port = int(said.get("NewInternalPort", "0"))
            lifetime_s = int(said.get("NewLeaseDuration", "0"))
        except ValueError:
            raise Refused(402, "Invalid Args") from None
        match action:
            case "GetExternalIPAddress":
                return {"NewExternalIPAddress": self._public}
            case "GetStatusInfo":
                uptime_s = int(time.monotonic() - self._began)
                return {
                    "NewConnectionStatus": "Connected",
                    "NewLastConnectionError": "ERROR_NONE",
                    "NewUptime": str(uptime_s),
                }
            case "AddPortMapping":
                if said.get("NewRemoteHost"):
                    raise Refused(726, "RemoteHostOnlySupportsWildcard")
                if said.get("NewEnabled", "1") != "1":
                    raise Refused(402, "Invalid Args")
                if said.get("NewInternalClient") != client:
                    raise Refused(606, "Action not authorized")
                self.lease(protocol, public_port, client, port, lifetime_s)
                return {}
            case "DeletePortMapping":
                self.release(protocol, public_port, client)
                return {}
            case "GetSpecificPortMappingEntry":
                with self._lock:
                    lease = self._leases.get((protocol, public_port))
                if lease is None:
                    raise Refused(714, "NoSuchEntryInArray")
                left_s = max(1, round(lease.until - time.monotonic())) if lease.until else 0
                return {
                    "NewInternalPort": str(lease.port),
                    "NewInternalClient": lease.client,
                    "NewEnabled": "1",
                    "NewPortMappingDescription": "",
                    "NewLeaseDuration": str(left_s),
                }
            case _:
                raise Refused(401, "Invalid Action")

    def _serve(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select(list(self._answers), [], [], _TICK_S)
            for answering in ready:
                message, sender = answering.recvfrom(2048)
                answer = self._answers[answering](message, sender[0])
                if answer is not None:
                    answering.sendto(answer, sender)
            self._expire()

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            for key, lease in list(self._leases.items()):
                if lease.until and lease.until <= now:
                    self._end(*key)

    def _end(self, protocol: str, public_port: int) -> None:
        del self._leases[protocol, public_port]
        with suppress(LabError):  # the lab's user has ended the forwarding already
            self._unforward(protocol, public_port)

    def _answer_nat_pmp(self, message: bytes, client: str) -> bytes | None:
        if len(message) < 2 or message[1] >= 128:
            return None
        version, opcode = message[:2]

        def answer(result: int, rest: bytes = b"") -> bytes:
            epoch_s = int(time.monotonic() - self._began)
            return struct.pack("!BBHI", 0, 128 + opcode, result, epoch_s) + rest

        if version != 0:
            return answer(_UNSUPPORTED_VERSION)
        if opcode == 0:
            return answer(_OK, socket.inet_aton(self._public))
        if opcode not in _NAT_PMP_OPCODES or len(message) != 12:
            return answer(_UNSUPPORTED_OPCODE)
        protocol = _NAT_PMP_OPCODES[opcode]
        port, wanted, lifetime_s = struct.unpack("!HHI", message[4:])
        held = self.find(protocol, client, port)
        if not lifetime_s:
            for public_port in held:
                self.release(protocol, public_port, client)
            return answer(_OK, struct.pack("!HHI", port, 0, 0))
        for public_port in [*held, wanted or port, *range(50000, 50100)]:
            try:
                self.lease(protocol, public_port, client, port, lifetime_s)
            except Refused as refused:
                if refused.args[0] != 718:
                    return answer(_NOT_AUTHORIZED, bytes(8))
            else:
                return answer(_OK, struct.pack("!HHI", port, public_port, lifetime_s))
        return answer(_OUT_OF_RESOURCES, bytes(8))

    def _answer_ssdp(self, message: bytes, client: str) -> bytes | None:
        lines = message.decode("latin-1").split("\r\n")
        fields = {name.strip().upper(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        wanted = fields.get("ST", "")
        known = ("upnp:rootdevice", f"{_DEVICE}InternetGatewayDevice:1", _SERVICE)
        if not lines[0].startswith("M-SEARCH ") or wanted not in ("ssdp:all", *known):
            return None
        found = known[1] if wanted == "ssdp:all" else wanted
        assert self._http is not None
        return (
            f"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nEXT:\r\nST: {found}\r\nUSN: uuid:netlab::{found}\r\n"
            f"SERVER: netlab UPnP/1.1\r\nLOCATION: http://{ADDRESS}:{self._http.server_port}/description\r\n\r\n"
        ).encode()


def _udp(address: str, port: int) -> socket.socket:
    answering = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    answering.bind((address, port))
    return answering


def _http_server(gateway: Gateway) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, _DESCRIPTION) if self.path == "/description" else self.send_error(404)

        def do_POST(self) -> None:
            try:
                body = ElementTree.fromstring(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
            except (ElementTree.ParseError, ValueError):
                self.send_error(400)
                return
            said = {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in body.iter()}
            action = self.headers.get("SOAPAction", "").strip('"').rpartition("#")[2]
            try:
                values = gateway.act(action, said, self.client_address[0])
            except Refused as refused:
                self._reply(500, _ENVELOPE.format(_FAULT.format(*refused.args)))
                return
            inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
            self._reply(200, _ENVELOPE.format(f'<u:{action}Response xmlns:u="{_SERVICE}">{inner}</u:{action}Response>'))

        def _reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", 'text/xml; charset="utf-8"')
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    return http.server.ThreadingHTTPServer((ADDRESS, 0), Handler)
