"""The process of `splitnet serve`: the socket, the model, and a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.causal_lm import attached
from splitnet.limits import FairAccount
from splitnet.process import Watchdog
from splitnet.serve.admission import Admission
from splitnet.serve.app import Gateway, make_app
from splitnet.serve.gate import IDLE_CONNECTIONS, ApiKeys, Connection
from splitnet.serve.generation import Generations
from splitnet.serve.grammars import Grammars
from splitnet.serve.prefix_cache import KeepLimits
from splitnet.serve.prompts import Prompts
from splitnet.serve.sampling import choose_defaults
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.transport.addresses import listen_at


@dataclass(frozen=True)
class ServeOptions:
    """See the options of the command."""

    host: str
    port: int
    api_key_file: Path | None
    max_requests: int
    max_waiting: int
    keep: KeepLimits
    drain_s: float
    speculate: Any = None
    checkpoint_sampling: bool = False
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    names: Sequence[str] = ()


def serve(
    checkpoint: Checkpoint,
    join: Callable[[], Swarm],
    model: ConnectionOptions,
    options: ServeOptions,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Serves a model until SIGINT or SIGTERM.

    Args:
        join: joins its swarm.
        model: how it runs.
        say: told where, and what is taken from the checkpoint, once requests are answered.
        warn: told what is dangerous.

    Raises:
        AddressInUse: the port is taken.
        SplitnetError: what else went wrong before requests were answered.
    """
    keys = ApiKeys.read(options.api_key_file)
    names = options.names or [checkpoint.name]
    with listen_at(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        if not keys.required and not ipaddress.ip_address(host).is_loopback:
            warn(f"anyone who reaches {host}:{port} can use this server: give --api-key-file, or --host 127.0.0.1")
        tokenizer = checkpoint.tokenizer()
        with join() as swarm:
            swarm.peers()  # tells a swarm of other weights
            remote = attached(checkpoint, swarm, model)
            defaults, said = choose_defaults(remote.generation_config, of_checkpoint=options.checkpoint_sampling)
            vocabulary = remote.config.get_text_config().vocab_size
            prompts = Prompts(tokenizer, vocabulary, checkpoint.max_positions)
            # Whoever has one of several keys finds a place soon, whatever the others do.
            spare = options.max_requests // 4 if len(keys) > 1 else 0
            generations = Generations(remote, prompts.decode, options.max_requests, options.keep, options.speculate)
            try:
                gateway = Gateway(
                    names[0],
                    generations,
                    prompts,
                    Grammars(tokenizer, vocabulary, generations.end_tokens),
                    Admission(options.max_requests, options.max_waiting, spare=spare),
                    defaults,
                    names[1:],
                )
                app = make_app(gateway, keys, int(time.time()), (options.host, *options.hosts), options.origins)
                server = _Server(app, generations, options.drain_s)
                # uvicorn raises a signal again when it has ended; it must not find a handler that ends the process.
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, server.handle_exit)
                shown = f"[{host}]" if ":" in host else host
                say(f"serving {' and '.join(names)} at http://{shown}:{port}/v1")
                say(f"the swarm and a chat are shown at http://{shown}:{port}/")
                for sentence in said:
                    say(sentence)
                server.run(sockets=[listener])
            finally:
                generations.close()


class _Server(uvicorn.Server):
    """Lets running requests finish when it is told to end, for a while; then they get an error."""

    def __init__(self, app: object, generations: Generations, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]
                log_config=None,
                access_log=False,
                server_header=False,
                http=partial(Connection, FairAccount(IDLE_CONNECTIONS)),  # pyright: ignore[reportArgumentType]
                ws="none",
                callback_notify=_tell_alive(),
                timeout_notify=1,
            )
        )
        self._generations = generations
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._generations.drain()
        ending = asyncio.get_running_loop().call_later(self._drain_s, self._generations.end)
        await super().shutdown(sockets)
        ending.cancel()


def _tell_alive() -> Callable[[], Awaitable[None]]:
    watchdog = Watchdog()

    async def tell() -> None:
        watchdog.alive()

    return tell
