"""The server of `splitnet serve` with a model without peers: `python -m tests.unit.serve.gateway_process OPTIONS`.

OPTIONS: places, places to wait, seconds within which a request must come, and a file of API keys or nothing.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from splitnet.checkpoint import demo
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.serve import request_gate, server
from splitnet.serve.session_cache import KeepLimits
from splitnet.session.options import ConnectionOptions
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, TEMPLATE


def main(places: str, waiting: str, request_s: str, keys: str = "") -> None:
    request_gate.REQUEST_S = float(request_s)
    checkpoint = Checkpoint.open(demo.demo_checkpoint())
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = TEMPLATE
    stand_ins: Any = server
    stand_ins.attached = lambda *_, **__: FakeModel(checkpoint.max_positions or 0)
    stand_ins.DemandPublisher = lambda *_: SimpleNamespace(asked=lambda *_: None, close=lambda: None)
    swarm: Any = SimpleNamespace(peers=list, directory=None, identity=None, facts=None, close=lambda: None)
    way = server.ModelSpec([MODEL], checkpoint, tokenizer, lambda _: swarm, ConnectionOptions())
    limits = KeepLimits(16, 100_000, 300.0)
    options = server.ServeOptions("127.0.0.1", 0, Path(keys) if keys else None, int(places), int(waiting), limits, 1.0)
    server.serve(way, [], None, options, say=partial(print, flush=True), warn=print)


if __name__ == "__main__":
    main(*sys.argv[1:])
