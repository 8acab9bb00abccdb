"""`splitnet demo`: three peer daemons on this machine, and one answer through them, or an API in front of them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from splitnet.checkpoint.demo import DEMO_NAME
from splitnet.cli.arguments import CodecName, Device, require, resolve_model
from splitnet.cli.peer_process import ForkedCommand, PeerProcess
from splitnet.cli.serve import serve as run_server
from splitnet.import_shims import import_models
from splitnet.session.options import ConnectionOptions
from splitnet.transport.addresses import listen_at

ONE_THREAD = ("--threads", "1")
EXACT = (*ONE_THREAD, "--weights", "float32", "--device", "cpu")
"""Options with which daemons compute the same results as plain transformers with float32."""

START_TIMEOUT_S = 180.0


class LocalSwarm:
    """Runs `count` daemons that share the blocks of a checkpoint (hub id or folder) evenly, until the `with` ends.

    options: command line options for each daemon. join: address of a swarm; empty: the daemons start a new swarm.
    forked: see `ForkedCommand`.
    """

    def __init__(
        self,
        checkpoint: str,
        count: int,
        options: tuple[str, ...] = ONE_THREAD,
        join: str = "",
        *,
        forked: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._forked = forked
        self._options = options
        self._join = join
        blocks = _count_blocks(checkpoint)
        count = min(count, blocks)
        edges = [round(index * blocks / count) for index in range(count + 1)]
        self.spans = list(itertools.pairwise(edges))
        self.daemons: list[PeerProcess] = []
        self._folder = tempfile.TemporaryDirectory(prefix="splitnet-demo-")

    def __enter__(self) -> LocalSwarm:
        for index in range(len(self.spans)):
            self.daemons.append(self._start(index))
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            daemon.close()
        self._folder.cleanup()

    def wait(self) -> str:
        """Waits until all daemons serve, and returns the address to join with."""
        first, *_ = [daemon.await_address(START_TIMEOUT_S) for daemon in self.daemons]
        return first

    @property
    def processes(self) -> list[subprocess.Popen[bytes] | ForkedCommand]:
        return [daemon.process for daemon in self.daemons]

    def _start(self, index: int) -> PeerProcess:
        start, end = self.spans[index]
        arguments = [self._checkpoint, "--blocks", f"{start}:{end}", "--listen", "tcp://127.0.0.1:0"]
        if self._join:
            arguments += ["--join", self._join]
        elif index:
            arguments += ["--join-file", str(self.daemons[0].address_file)]
        return PeerProcess(
            f"daemon {index + 1}", [*arguments, *self._options], Path(self._folder.name), forked=self._forked
        )


def _count_blocks(checkpoint: str) -> int:
    """The number of blocks of a checkpoint. For a local folder, torch is not loaded."""
    config = Path(checkpoint) / "config.json"
    if config.is_file():
        with suppress(OSError, ValueError, AttributeError, RecursionError):  # `Checkpoint.open` below reports errors
            values = json.loads(config.read_text(encoding="utf-8"))
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                if isinstance(values.get(name), int):
                    return values[name]
    from splitnet.checkpoint.checkpoint import Checkpoint

    return Checkpoint.open(checkpoint).num_blocks


PROMPT = "Explain in three sentences how bees find their way home."


def demo(
    model: Annotated[
        str, typer.Argument(help="Hugging Face id, checkpoint folder or GGUF file instead of SmolLM2-135M-Instruct.")
    ] = DEMO_NAME,
    prompt: Annotated[str, typer.Option(help="The question.")] = PROMPT,
    peers: Annotated[int, typer.Option(min=1, max=16, help="How many daemons to start.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 128,
    codec: CodecName = "int8",
    device: Device = "auto",
    serve: Annotated[
        bool, typer.Option("--serve", help="Run `splitnet serve` with these peers until interrupted, instead.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0: any free port.")] = 8000,
) -> None:
    """Start peers as separate processes, each with its own blocks only, and generate an answer through them."""
    if serve:
        require("serve", "--serve")
        listen_at("127.0.0.1", port).close()  # fails at once if the port is taken
    if forked := sys.platform == "linux":
        ForkedCommand.prepare()  # at the same time as the imports of this process
    checkpoint = resolve_model(model)
    local = LocalSwarm(checkpoint, peers, (*ONE_THREAD, "--device", device), forked=forked)
    typer.secho(f"starting {len(local.spans)} peers, which load and measure their blocks ...", err=True)

    with local as swarm:
        for index, blocks in enumerate(swarm.spans):
            typer.secho(f"  daemon {index + 1}: blocks {blocks[0]}..{blocks[1] - 1}", err=True)
        if serve:
            address = swarm.wait()
            typer.secho(f"others on this machine join with --join {address}", err=True)
            run_server(models=[str(checkpoint)], initial_peers=[address], port=port, codec=codec, device=device)
        else:
            _ask(checkpoint, swarm, prompt, max_new_tokens, codec, device)
    typer.secho("all daemons have left; nothing is running any more", err=True)


def _ask(checkpoint: str, swarm: LocalSwarm, prompt: str, max_new_tokens: int, codec: str, device: str) -> None:
    # The daemons load at the same time as this process.
    import_models()
    from splitnet.cli.connection import ModelConnection
    from splitnet.cli.text_generator import SamplingOptions, TextGenerator, print_summary

    options = ConnectionOptions(initial_peers=[swarm.wait()], codec=codec, device=device)
    client = TextGenerator.connect(ModelConnection(checkpoint, options))
    with closing(client.model):
        typer.secho(f"\n> {prompt}\n", bold=True)
        asked = client.encode_prompt(prompt, chat=None)
        with client.model.session() as cache:
            answer = client.print_answer(asked, SamplingOptions(max_new_tokens, 0.0, 1.0, None))
            typer.echo()
            if cache.session is not None:
                print_summary(answer, cache.session)
