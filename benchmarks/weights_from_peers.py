"""How fast a new peer without files fetches its blocks from three others, compared with the limit of the links.

    sudo .venv/bin/python -m benchmarks.weights_from_peers CHECKPOINT [--up 40] [--down 100] [--delay 10]

Three daemons on hosts of an emulated network (docs/netlab.md) serve a third of the model each and share the
files of the whole model. A fourth host, whose cache is empty, starts a peer for all blocks. The time of the fetch
begins with the first question to the peers, and ends when the last piece is verified and on the disk. The limit is the
smaller of the new peer's downlink and the sum of the others' uplinks; headers of TCP and IP take 3.5 % of this rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.netlab import Lab
from benchmarks.netlab.peers import LabPeers, even_spans

GIVERS = ("a", "b", "c")


def measure(checkpoint: str, up: float, down: float, delay: float) -> dict[str, float]:
    """Measures a fetch. Returns the bytes, the seconds, and the bytes from each of the three peers, by name."""
    from splitnet.checkpoint.checkpoint import Checkpoint

    model = Checkpoint.open(checkpoint)
    with Lab([*GIVERS, "new"], delay_ms=delay) as lab:
        for giver in GIVERS:
            lab.access(giver, delay_ms=delay / 2, rate_mbit=up)
        lab.access("new", delay_ms=delay / 2, rate_mbit=down)
        spans = even_spans(model.num_blocks, GIVERS)
        with (
            LabPeers(lab, checkpoint, spans, options=["--share-weights", "--weights", "auto"]) as peers,
            tempfile.TemporaryDirectory() as cache,
        ):
            command = [
                sys.executable,
                "-m",
                "benchmarks.weights_from_peers",
                model.name,
                "--fetch",
                peers.addresses["a"],
            ]
            command += ["--listen", f"tcp://{lab.address('new')}:0", "--blocks", str(model.num_blocks)]
            started = lab.run(
                "new", command, stdout=subprocess.PIPE, text=True, env={**os.environ, "SPLITNET_CACHE": cache}
            )
            output, _ = started.communicate(timeout=300)
    return json.loads(output.splitlines()[-1])


def fetch(model: str, address: str, listen: str, blocks: int) -> None:
    """Runs in the host of the new peer: starts the peer and prints the figures of the fetch."""
    from peers.peer_options import PeerOptions, SpanWish
    from peers.running_peer import RunningPeer

    times: list[float] = []

    def report(stage: str, done: int, total: int) -> None:
        if stage.startswith("fetch weights"):
            times.append(time.perf_counter())

    options = PeerOptions(
        initial_peers=[address], wish=SpanWish((0, blocks)), listen=listen, weights="auto", device="cpu"
    )
    # A folder or file of this name need not exist here: the peer looks the name up among the models of the swarm.
    peer = RunningPeer.start(model, options, progress=report)
    try:
        assert peer._fetcher is not None
        fetched = peer._fetcher.fetched
        result = {"bytes": sum(fetched.by_source.values()), "seconds": times[-1] - times[0], "wasted": fetched.wasted}
        shares = {f"from {number}": share for number, share in enumerate(fetched.by_source.values(), 1)}
        print(json.dumps(result | shares), flush=True)
    finally:
        peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--up", type=float, default=40, help="Mbit/s of each of the three")
    parser.add_argument("--down", type=float, nargs="*", default=[100, 200], help="Mbit/s of the new peer")
    parser.add_argument("--delay", type=float, default=10, help="ms one way")
    parser.add_argument("--fetch", help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.checkpoint, arguments.fetch, arguments.listen, arguments.blocks)
        return
    checkpoint = arguments.checkpoint
    if Path(checkpoint).exists():
        checkpoint = str(Path(checkpoint).resolve())
    print(f"load {os.getloadavg()[0]:.1f}")
    print("| downlink | uplinks | MiB | s | Mbit/s | of what the links allow | shares of the three | came twice |")
    print("|---|---|---|---|---|---|---|---|")
    for down in arguments.down:
        found = measure(checkpoint, arguments.up, down, arguments.delay)
        mbit = found["bytes"] * 8 / 1e6 / found["seconds"]
        least = min(down, arguments.up * len(GIVERS))
        shares = ", ".join(f"{found[key] / found['bytes']:.0%}" for key in sorted(found) if key.startswith("from"))
        print(
            f"| {down:g} | 3 x {arguments.up:g} | {found['bytes'] / 2**20:.1f} | {found['seconds']:.2f} | {mbit:.1f} | "
            f"{mbit / least:.1%} | {shares} | {found['wasted'] / found['bytes']:.2%} |",
            flush=True,
        )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
