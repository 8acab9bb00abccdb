"""A peer that lies, or an honest one that publishes a modest speed: a program of `benchmarks.liars`.

    python -m benchmarks.lying_peer MODEL WEIGHTS KIND START:END FILE [ADDRESS]

Serves blocks with the weights of the folder WEIGHTS, says that they are those of MODEL, and writes lines with its
address to join, its key and its endpoint to FILE. KIND: `honest` or one of `KINDS`.

    python -m benchmarks.lying_peer changing SECONDS FILE peer MODEL ...

The command `splitnet peer`, which begins a lie of `CHANGING`, or an honest time, every SECONDS (0.5 to 1.5 times as
many), and appends lines with the time, its key and the lie to FILE.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peers.peer_options import PeerOptions, SpanWish
from peers.running_peer import RunningPeer
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.main import main as splitnet
from splitnet.wire.messages import FailureCode
from splitnet.wire.receipts import DIGEST

MODEST_MS = 50.0  # per block, which honest peers publish
CLAIM = "bfloat16/float32"
HELD = {"int4 for bfloat16": ("int4", CLAIM), "int8 for bfloat16": ("int8", CLAIM)}
HELD["int4 for int8"] = ("int4", "int8/float32")
MOVED = {"weights moved 1 %": 0.01, "weights moved 3 %, bfloat16": 0.03}
FIRST = "noise 5 %, first start"
KINDS = [*MOVED, "block left out", *HELD, "noise 5 %", "steering 5 %", "scaled 2 %", "other pages"]
KINDS += ["sends other than it signs", "signs other than it was sent", "no receipts"]
TWO = ("noise 5 %", "no receipts")  # at once
KINDS += [" and ".join(TWO)]
HONEST = "honest"
CHANGING = KINDS[KINDS.index("noise 5 %") :]  # lies that need no other weights
HONEST_SHARE = 0.3  # of the times of a changing peer


def noisy(values: Tensor) -> Tensor:
    return values + 0.05 * values.norm(dim=1, keepdim=True) * torch.randn_like(values) / values.shape[1] ** 0.5


def steered(values: Tensor) -> Tensor:
    vector = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(1))
    return values + 0.05 * values.norm(dim=1, keepdim=True) * vector / vector.norm()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    FIRST: noisy,
    "noise 5 %": noisy,
    "steering 5 %": steered,
    "scaled 2 %": lambda values: 1.02 * values,
}


def other_weights(model: Path, folder: Path, kind: str) -> Path:
    """The model with each weight moved at random by a part of its matrix's deviation, or without block 12."""
    torch.manual_seed(1)

    def change(name: str, tensor: Tensor) -> Tensor:
        if kind in MOVED and tensor.ndim == 2:
            wide = tensor.float()
            return (wide + MOVED[kind] * wide.std() * torch.randn_like(wide)).to(tensor.dtype)
        skipped = "layers.12." in name and ("o_proj" in name or "down_proj" in name) and kind not in MOVED
        return torch.zeros_like(tensor) if skipped else tensor

    folder.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            save_file({name: change(name, each) for name, each in load_file(file).items()}, folder / file.name)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def lie(peer: RunningPeer, kind: str) -> Callable[[], None]:
    """Makes a running peer lie until the result is called."""
    service: Any = peer.service
    if kind == " and ".join(TWO):
        ends = ExitStack()
        for each in TWO:
            ends.callback(lie(peer, each))
        return ends.close

    def add_output(work: Any, values: Tensor) -> None:
        honest(work, CHANGES[kind](values))

    def find_pages(session: Any, message: Any, pages: Any) -> None:
        negated = [replace(each, tensors={name: -data for name, data in each.tensors.items()}) for each in pages]
        honest(session, message, negated)

    def send_other(work: Any, payload: bytes) -> None:
        honest(work, (np.frombuffer(payload, np.float32) * np.float32(1.1)).tobytes())

    def sign_other(source: Any, session: Any, message: Any, now: float) -> None:
        for row in session.digests._rows.values():
            row.data[:DIGEST] = bytes(range(DIGEST))
        honest(source, session, message, now)

    def refuse(source: Any, message: Any, _: float) -> None:
        service._refuse_message(source, message, FailureCode.BAD_MESSAGE, "no audits")

    replaced: dict[str, tuple[Any, str, Callable[..., None]]] = {
        **dict.fromkeys(CHANGES, (service.outputs, "add_output", add_output)),
        "other pages": (service.rows, "found", find_pages),
        "sends other than it signs": (service.outputs, "_send_output", send_other),
        "signs other than it was sent": (service._receipts, "answer", sign_other),
        "no receipts": (service, "_answer_audit", refuse),
    }
    if kind not in replaced:  # it holds other weights, or is honest
        return lambda: None
    owner, name, lying = replaced[kind]
    honest = getattr(owner, name)
    setattr(owner, name, lying)
    return partial(delattr, owner, name)


def change_lies(peer: RunningPeer, seconds: float, file: Path) -> None:
    choices, kind, until = random.Random(peer.record().key.text), HONEST, 0.0
    service, end = peer.service, lie(peer, kind)
    while True:
        due = time.time() >= until
        if due:
            kind = HONEST if choices.random() < HONEST_SHARE else choices.choice(CHANGING)
            until = time.time() + seconds * choices.uniform(0.5, 1.5)
        if due or service is not peer.service:  # the peer has moved
            end()
            service, end = peer.service, lie(peer, kind)
            with file.open("a") as log:
                log.write(f"{time.time()} {peer.record().key.text} {kind}\n")
        time.sleep(0.1)


def change(seconds: float, file: Path, arguments: list[str]) -> None:
    """`splitnet peer`, with changing lies."""
    start: Any = RunningPeer.start

    def start_lying(*given: Any, **named: Any) -> RunningPeer:
        peer = start(*given, **named)
        threading.Thread(target=change_lies, args=(peer, seconds, file), daemon=True).start()
        return peer

    RunningPeer.start = start_lying  # type: ignore[method-assign]
    sys.argv = ["splitnet", *arguments]
    splitnet()


def main(model: Path, other: Path, kind: str, blocks: str, file: str, join: str = "") -> None:
    """Serves until a signal."""
    torch.set_num_threads(1)
    start, end = map(int, blocks.split(":"))
    weights, claim = HELD.get(kind, ("bfloat16", ""))
    if claim:
        Span.held_as = property(lambda _: claim)  # type: ignore[assignment, method-assign]
    fingerprint = Checkpoint.open(model).fingerprint
    Checkpoint.fingerprint = property(lambda _: fingerprint)  # type: ignore[assignment, method-assign]
    options = PeerOptions(
        wish=SpanWish(blocks=(start, end)),
        initial_peers=[join] if join else (),
        listen="tcp://127.0.0.1:0",
        weights=weights,
        dtype="bfloat16" if "bfloat16" in kind and kind in MOVED else "float32",
        kv_memory=256 << 20,
    )
    peer = RunningPeer.start(other, options)
    lie(peer, kind)
    announcer: Any = peer._announcer

    def describe() -> Any:
        record = peer.record()
        speed = tuple(MODEST_MS if kind == "honest" else 0.0 for _ in record.block_ms)
        return replace(record, block_ms=speed, queue_ms=0.0, batch=0.0, kv_free_positions=1 << 20, sessions=0)

    announcer.describe = describe
    announcer.publish()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    Path(f"{file}.tmp").write_text(f"{peer.directory.addresses[0]}\n{peer.record().key.text}\n{peer.endpoint.address}")
    Path(f"{file}.tmp").rename(file)
    ended.wait()
    peer.close()


if __name__ == "__main__":
    if sys.argv[1] == "changing":
        change(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        name, other, *rest = sys.argv[1:]
        main(Path(name), Path(other), *rest)
