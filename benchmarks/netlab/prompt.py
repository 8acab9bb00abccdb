"""An interactive prompt for a lab."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab
from benchmarks.netlab.router import named

_HELP = """\
delay A B MS         one-way delay between two hosts
rate A B MBIT        Mbit/s between two hosts, 0: no limit
loss A B PERCENT     packets lost between two hosts
                     (the value "-" restores the values of the hosts' access links)
access A MS MBIT PERCENT   the access link of a host
cut A B              drop everything between two hosts
down A, up A         drop everything from and to a host; end this
heal                 end all cuts, bring all hosts up
router R KIND        change the kind of a router, which forgets its mappings
forward R PROTOCOL PORT A PORT   forward a tcp or udp port of a router to a port of a host behind it
unforward R PROTOCOL PORT        end the forwarding of this port
run A COMMAND ...    run a command in a host; host names in its arguments become addresses
start A COMMAND ...  as run, without waiting for the end of the command
quit                 stop everything"""


def prompt(lab: Lab) -> None:
    """Reads commands for a lab from stdin until its end or `quit`."""
    for host in (*lab.hosts, *lab.routers):
        public = lab.public_address(host)
        seen = f" (public: {public})" if public != lab.address(host) else ""
        print(f"{host}: {lab.address(host)}{seen}, from another terminal: {lab.entrance(host)} COMMAND")
    print("`help` lists commands; Ctrl-D ends.")
    while True:
        try:
            words = shlex.split(input("netlab> "))
            if words == ["quit"]:
                return
            if words:
                _obey(lab, words)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except (LabError, OSError, ValueError) as error:
            print(f"error: {error}")


def _obey(lab: Lab, words: list[str]) -> None:
    pairs: dict[str, Callable[[str, str, float | None], None]] = {
        "delay": lab.delay,
        "rate": lab.rate,
        "loss": lab.loss,
    }
    match words:
        case ["help"]:
            print(_HELP)
        case [("delay" | "rate" | "loss") as what, a, b, value]:
            pairs[what](a, b, None if value == "-" else float(value))
        case ["access", host, delay, rate, loss]:
            lab.access(host, delay_ms=float(delay), rate_mbit=float(rate), loss_percent=float(loss))
        case ["cut", a, b]:
            lab.cut(a, b)
        case ["down", host]:
            lab.down(host)
        case ["up", host]:
            lab.up(host)
        case ["heal"]:
            lab.heal()
        case ["router", router, kind]:
            lab.configure(router, named(kind))
        case ["forward", router, protocol, port, host, host_port]:
            lab.forward(router, protocol, int(port), host, int(host_port))
        case ["unforward", router, protocol, port]:
            lab.unforward(router, protocol, int(port))
        case [("run" | "start") as how, host, *command] if command:
            addresses = {name: lab.address_from(host, name) for name in (*lab.hosts, *lab.routers)}
            process = lab.run(host, [addresses.get(word, word) for word in command])
            if how == "run":
                process.wait()
        case _:
            print(f"no such command: {shlex.join(words)}; `help` lists them")
