"""`splitnet serve`: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, box, connects, require
from splitnet.cli.generate import Speculate, connection_to
from splitnet.errors import SplitnetError
from splitnet.logs import tell
from splitnet.session.options import ConnectionOptions
from splitnet.transport.addresses import listen_at

in_http = box("HTTP")
in_limits = box("How much at a time")


SamplingDefaults = StrEnum("SamplingDefaults", ["openai", "checkpoint"])  # where a request does not say


def _checked_origins(origins: list[str] | None) -> list[str] | None:
    for origin in origins or ():
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
            raise SplitnetError(f"{origin!r} is no site: write it as browsers do, https://HOST or https://HOST:PORT")
    return origins


def _checked_names(names: list[str] | None) -> list[str] | None:
    if any(not name.strip() for name in names or ()):
        raise SplitnetError("--served-name is empty: give a name, or leave it out")
    return names


@connects()
def serve(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    host: Annotated[str, in_http(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, in_http(min=0, max=65535, help="Port to listen on; 0 is any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        in_http(
            help="File with the API keys that clients may use, one per line, before or after it options as in "
            "`weight=4,tokens-per-minute=6000`; anyone if not given."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        in_http(
            metavar="NAME",
            help="Host name by which the server may be asked where there are no API keys, besides localhost and IP "
            "addresses. Can be given several times.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        in_http(
            metavar="ORIGIN",
            callback=_checked_origins,
            help="Site whose pages may use the server, such as https://chat.example.org, besides those of this "
            "machine; * is any, with API keys only. Can be given several times.",
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        in_http(
            metavar="NAME",
            callback=_checked_names,
            help="Name of the model in requests and answers; that of its folder, file or hub id if not given. Can be "
            "given several times; answers have the first.",
        ),
    ] = None,
    max_requests: Annotated[int, in_limits(min=1, max=1024, help="Requests that run at a time.")] = 16,
    max_waiting: Annotated[int, in_limits(min=0, help="Requests that wait; more are told to come again.")] = 64,
    keep_sessions: Annotated[
        int, in_limits(min=0, help="Chats whose KV caches stay on the peers between turns; 0: none.")
    ] = 16,
    keep_positions: Annotated[int, in_limits(min=0, help="Positions of KV cache that they take at most.")] = 16384,
    keep_for: Annotated[float, in_limits(min=0, metavar="SECONDS", help="How long they stay without use.")] = 300.0,
    drain_s: Annotated[
        float,
        in_limits("--drain", min=0, metavar="SECONDS", help="Time for running requests to finish when told to end."),
    ] = 10.0,
    sampling_defaults: Annotated[
        SamplingDefaults,
        typer.Option(help="Temperature and others that a request leaves out: OpenAI's, or the checkpoint's own."),
    ] = SamplingDefaults.openai,
    show_tuning: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of a run of `splitnet tune`, which the page at / shows, too."),
    ] = None,
    speculate: Speculate = "auto",
) -> None:
    """Serve MODEL over HTTP as OpenAI's API does, until interrupted (SIGINT or SIGTERM).

    Chats, completions, streaming and tools; docs/serve.md lists what is supported. A page at / shows the swarm, with a
    chat.
    """
    require("serve", "splitnet serve")
    listen_at(host, port).close()  # to tell it now
    from splitnet.serve.gate import ApiKeys

    ApiKeys.read(api_key_file)
    if "*" in (allow_origin or ()) and api_key_file is None:
        raise SplitnetError("--allow-origin * opens the server to the pages of all sites: give --api-key-file, too")
    connection = connection_to(model, connecting)
    from splitnet.cli.generation import drafts_of
    from splitnet.serve.server import ServeOptions
    from splitnet.serve.server import serve as serve_until_told
    from splitnet.serve.session_cache import KeepLimits

    checkpoint = connection.checkpoint()
    options = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        max_requests=max_requests,
        max_waiting=max_waiting,
        keep=KeepLimits(keep_sessions, keep_positions, keep_for),
        drain_s=drain_s,
        speculate=drafts_of(speculate, connection),
        hosts=allow_host or (),
        origins=allow_origin or (),
        names=served_name or (),
        tuned=show_tuning,
        checkpoint_sampling=sampling_defaults is SamplingDefaults.checkpoint,
    )
    join, warn = partial(connection.swarm, checkpoint), partial(tell, logging.WARNING)
    serve_until_told(checkpoint, join, connection.options, options, say=typer.echo, warn=warn)
