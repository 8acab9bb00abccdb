"""An emulated network for manual use, and a check of its accuracy.

python -m benchmarks.netlab open HOST HOST ... [--delay MS] [--rate MBIT] [--loss PERCENT]
    [--router NAME=KIND:HOST,HOST,...]
python -m benchmarks.netlab check
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from benchmarks.netlab.check import check
from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab
from benchmarks.netlab.prompt import prompt
from benchmarks.netlab.router import NAMED, PROTOCOLS, Router, named


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    opening = commands.add_parser("open", help="start hosts, then read commands until Ctrl-D")
    opening.add_argument("hosts", nargs="+", metavar="HOST", help="any names")
    opening.add_argument("--delay", type=float, default=0.0, metavar="MS", help="one-way, between any two hosts")
    opening.add_argument("--rate", type=float, default=0.0, metavar="MBIT", help="of every host's link; 0: no limit")
    opening.add_argument("--loss", type=float, default=0.0, metavar="PERCENT", help="between any two hosts")
    opening.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="NAME=KIND:HOST,...",
        help=f"a router with the hosts or routers behind it; may be repeated. Kinds: {', '.join(NAMED)}",
    )
    commands.add_parser("check", help="compare delay, rate and loss with the settings; some minutes")
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            check()
        else:
            everywhere = {"delay_ms": arguments.delay, "rate_mbit": arguments.rate, "loss_percent": arguments.loss}
            routers: dict[str, Router] = {}
            behind: dict[str, str] = {}
            for text in arguments.router:
                name, router, members = _router(text)
                routers[name] = router
                behind |= dict.fromkeys(members, name)
            with Lab(arguments.hosts, **everywhere, routers=routers, behind=behind) as lab:
                prompt(lab)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _router(text: str) -> tuple[str, Router, list[str]]:
    """A router and the hosts behind it, from its text on the command line."""
    name, _, rest = text.partition("=")
    kind, _, members = rest.partition(":")
    if not name or not members:
        raise LabError(f"--router {text}: say NAME=KIND:HOST,HOST,...")
    return name, replace(named(kind), protocols=PROTOCOLS), members.split(",")


if __name__ == "__main__":
    sys.exit(main())
