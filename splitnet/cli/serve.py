"""`splitnet serve`: models over HTTP, with the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitnet.cli.arguments import connects, option_group, require
from splitnet.cli.generate import Speculate, connection_to
from splitnet.errors import SplitnetError
from splitnet.logs import write_user_message
from splitnet.paths import is_on_hub
from splitnet.session.options import ConnectionOptions
from splitnet.transport.addresses import listen_at

if TYPE_CHECKING:
    from splitnet.cli.connection import ModelConnection
    from splitnet.directory.interface import SwarmDirectory
    from splitnet.serve.server import ModelSpec

in_http = option_group("HTTP")
in_models = option_group("Models")
in_limits = option_group("How much at a time")


AGAIN_S = 600.0  # Seconds until an unreadable model of the swarm is tried again
MOST_FOUND = 64  # Maximum number of models of the swarm that are tried

# Sources of values that a request leaves out
SamplingDefaults = StrEnum("SamplingDefaults", ["openai", "checkpoint"])


def _checked_origins(origins: list[str] | None) -> list[str] | None:
    for origin in origins or ():
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
            raise SplitnetError(f"{origin!r} is not a site: write https://HOST or https://HOST:PORT, as browsers do")
    return origins


def _checked_hosts(hosts: str | None) -> str | None:
    for host in hosts.split(",") if hosts is not None else ():
        if not re.fullmatch(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", host):
            raise SplitnetError(f"--image-hosts {host!r} is not a host: write NAME or NAME:PORT in small letters")
    return hosts


def _checked_names(names: list[str] | None) -> list[str] | None:
    if any(not name.strip() for name in names or ()):
        raise SplitnetError("--served-name is empty: give a name, or leave it out")
    return names


def _checked_state(url: str | None) -> str | None:
    if url is not None:
        require("state", "--state")
        if not re.fullmatch(r"(redis|rediss|valkey|valkeys|unix)://.+", url):
            raise SplitnetError("--state is not a URL of Valkey or Redis: write redis://HOST:PORT/0")
    return url


@connects()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Hugging Face ids, checkpoint folders or GGUF files; the first is loaded at once and stays loaded. "
            "`demo` is SmolLM2-135M-Instruct. If none is given, the model of --invite.",
            show_default=False,
        ),
    ] = None,
    *,
    connecting: ConnectionOptions,
    host: Annotated[str, in_http(help="Address to listen on; 0.0.0.0: all addresses of this machine.")] = "127.0.0.1",
    port: Annotated[int, in_http(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        in_http(
            help="File with the API keys of clients, one per line, with options before or after the key as in "
            "`weight=4,tokens-per-minute=6000`; by default anyone may use the server."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        in_http(
            metavar="NAME",
            help="Host name that requests may use if there are no API keys, in addition to localhost and IP addresses. "
            "Can be given several times.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        in_http(
            metavar="ORIGIN",
            callback=_checked_origins,
            help="Site whose pages may use the server, such as https://chat.example.org, in addition to sites on this "
            "machine; * allows all sites, with API keys only. Can be given several times.",
        ),
    ] = None,
    route_header: Annotated[
        bool,
        in_http(
            "--route-header/--no-route-header",
            help="Whether the header X-Splitnet-Route of answers names the peers of the route.",
        ),
    ] = True,
    image_hosts: Annotated[
        str | None,
        in_http(
            metavar="HOST,...",
            callback=_checked_hosts,
            help="Hosts (NAME or NAME:PORT) from which images in requests are fetched; by default none.",
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        in_http(
            metavar="NAME",
            callback=_checked_names,
            help="Name of the model in requests and answers; by default from its folder, file or hub id. Can be "
            "given several times; answers use the first name.",
        ),
    ] = None,
    serve_all: Annotated[
        bool, in_models("--all", help="Serve all models of the swarm that are on the hub, too.")
    ] = False,
    adapter: Annotated[
        list[str] | None,
        in_models(
            metavar="NAME=DIR",
            help="Adapter for the first model, served as MODEL:NAME. Can be given several times.",
        ),
    ] = None,
    keep_models: Annotated[
        int, in_models(min=1, help="Models that stay loaded besides the first; the least recently used is unloaded.")
    ] = 4,
    max_requests: Annotated[
        int, in_limits(min=1, max=1024, help="Maximum number of requests that run at the same time.")
    ] = 16,
    max_waiting: Annotated[
        int, in_limits(min=0, help="Maximum number of waiting requests; further requests are refused.")
    ] = 64,
    keep_sessions: Annotated[
        int, in_limits(min=0, help="Maximum number of chats whose KV caches stay on the peers between turns.")
    ] = 16,
    keep_positions: Annotated[int, in_limits(min=0, help="Maximum positions of KV cache for these chats.")] = 16384,
    keep_for: Annotated[float, in_limits(min=0, metavar="SECONDS", help="How long unused chats stay.")] = 300.0,
    drain_s: Annotated[
        float,
        in_limits("--drain", min=0, metavar="SECONDS", help="Time for running requests to finish at the end."),
    ] = 10.0,
    sampling_defaults: Annotated[
        SamplingDefaults,
        typer.Option(help="Defaults of temperature and other values of requests: OpenAI's, or the checkpoint's."),
    ] = SamplingDefaults.openai,
    show_tuning: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of a run of `splitnet tune`, which the page at / shows, too."),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=_checked_state,
            help="Valkey or Redis that several gateways share, as redis://HOST:PORT/0: these gateways count quotas "
            "together, find each other's responses, and continue each other's answers.",
        ),
    ] = None,
    speculate: Speculate = "auto",
) -> None:
    """Serve models over HTTP as OpenAI's, Anthropic's and Ollama's APIs do, until interrupted (SIGINT or SIGTERM).

    Chats, completions, streaming and tools; docs/serve.md lists what is supported. A page at / shows the swarm, with a
    chat.
    """
    require("serve", "splitnet serve")
    listen_at(host, port).close()  # fails at once if the port is taken
    from splitnet.serve.request_gate import ApiKeys

    ApiKeys.from_file(api_key_file)
    if "*" in (allow_origin or ()) and api_key_file is None:
        raise SplitnetError("--allow-origin * opens the server to the pages of all sites: give --api-key-file, too")
    write_user_message(logging.INFO, "opening the checkpoint ...")
    connection = connection_to(models[0] if models else None, connecting)
    from splitnet.cli.text_generator import drafts_of
    from splitnet.serve.server import ModelSpec, ServeOptions
    from splitnet.serve.server import serve as serve_until_told
    from splitnet.serve.session_cache import KeepLimits

    options = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        max_requests=max_requests,
        max_waiting=max_waiting,
        keep=KeepLimits(keep_sessions, keep_positions, keep_for),
        drain_s=drain_s,
        hosts=allow_host or (),
        origins=allow_origin or (),
        tuned=show_tuning,
        checkpoint_sampling=sampling_defaults is SamplingDefaults.checkpoint,
        keep_models=keep_models,
        image_hosts=image_hosts.split(",") if image_hosts else (),
        state=state,
        names_route=route_header,
    )

    def through(spec: ModelConnection, names: list[str] | None = None) -> ModelSpec:
        checkpoint, drafts = spec.checkpoint(), drafts_of(speculate, spec)
        return ModelSpec(
            names or [checkpoint.name], checkpoint, checkpoint.tokenizer(), spec.swarm, spec.options, drafts
        )

    def named(model: str, model_id: str | None = None) -> ModelSpec:
        return through(connection_to(model, replace(connecting, model_id=model_id or connecting.model_id)))

    first = through(connection, served_name)
    others = [*map(named, (models or [])[1:])]
    for name, folder in map(_named_folder, adapter or ()):
        others.append(replace(first, names=[f"{one}:{name}" for one in first.names], adapter=folder))
    found = HubModelFinder(named) if serve_all else None
    write_user_message(logging.INFO, "joining the swarm and loading the client part ...")
    serve_until_told(first, others, found, options, say=typer.echo, warn=partial(write_user_message, logging.WARNING))


def _named_folder(given: str) -> tuple[str, Path]:
    name, is_named, folder = given.partition("=")
    if not is_named or not name or not Path(folder).is_dir():
        raise SplitnetError(
            f"--adapter {given!r} names no folder: give NAME=DIR with a folder that `splitnet tune` has written"
        )
    return name, Path(folder)


class HubModelFinder:
    """Finds the models of a swarm whose names are hub ids, so that peers cannot name files of this machine.

    Models that have left the swarm stay in the result. named: returns a model by name and fingerprint. If `named`
    raises a SplitnetError, the model is tried again after `AGAIN_S`.
    """

    def __init__(self, named: Callable[[str, str], ModelSpec], clock: Callable[[], float] = time.monotonic) -> None:
        self._named = named
        self._clock = clock
        self._looked: dict[str, tuple[float, ModelSpec | None]] = {}  # by fingerprint: time and result of the attempt

    def __call__(self, directory: SwarmDirectory) -> list[ModelSpec]:
        from splitnet.swarm.swarm_models import models_of

        for id, (at, spec) in list(self._looked.items()):
            if spec is None and self._clock() - at > AGAIN_S:
                del self._looked[id]
        for model in models_of(directory):
            is_new = model.fingerprint not in self._looked and len(self._looked) < MOST_FOUND
            if is_on_hub(model.name) and is_new and not model.missing:
                self._looked[model.fingerprint] = self._clock(), None
                with suppress(SplitnetError):
                    self._looked[model.fingerprint] = self._clock(), self._named(model.name, model.fingerprint)
        return [spec for _, spec in self._looked.values() if spec is not None]
