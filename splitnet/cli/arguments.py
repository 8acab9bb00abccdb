"""Arguments that several commands share, and parsers of their values.

A shared option has the same meaning in all of its commands. One environment variable, or the table `[common]` of the
configuration file, sets the option for all its commands; see `splitnet/cli/configuration.py`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from splitnet.blocks.chosen_device import DEVICE_NAME
from splitnet.errors import SplitnetError
from splitnet.limits import parse_bytes
from splitnet.session.options import ConnectionOptions, Preference, Prefixes, Vision
from splitnet.wire.kv_forms import KVForms

Command = Callable[..., None]


def option_group(title: str) -> Any:
    """Returns a function that declares options as `typer.Option` does, in one box of `--help`.

    The function's attribute `shared` declares options that several commands share.
    """
    option: Any = functools.partial(typer.Option, rich_help_panel=title)
    option.shared = functools.partial(_shared, option)
    return option


def _shared(declare: Callable[..., Any], flags: str, **options: Any) -> Any:
    """Declares an option with the same meaning in several commands. One variable, named after the option's flag, sets
    the option in all of them."""
    return declare(flags, envvar=f"SPLITNET_{flags.partition('/')[0][2:].upper().replace('-', '_')}", **options)


in_swarm = option_group("Swarm")
in_keys = option_group("Keys")
in_computing = option_group("Computing here")
in_route = option_group("Route")
in_network = option_group("Network")


def checked_addresses(addresses: list[str] | None) -> list[str] | None:
    """Returns the addresses. Refuses malformed addresses before slow work begins."""
    for address in addresses or ():
        if address.startswith("tcp://"):
            from splitnet.transport.addresses import check_peer_address

            check_peer_address(address)
        elif not re.fullmatch(r"/.+/p2p/\w+", address):
            raise SplitnetError(
                f"{address!r} is not an address to join with: copy a whole address that a peer prints, /ip4/... or "
                "tcp://..."
            )
    return addresses


def _checked_codec(name: str) -> str:
    if name != "auto":
        from splitnet.wire.codecs import codec_by_name

        codec_by_name(name)
    return name


def _checked_device(name: str) -> str:
    """Refuses malformed names of devices before slow work begins; `find_device` later checks that the device exists."""
    if not DEVICE_NAME.fullmatch(name):
        raise SplitnetError(f"there is no device {name!r}: use --device auto, cpu, cuda, cuda:1, mps or xpu")
    return name


_MODEL = "Hugging Face id, checkpoint folder or GGUF file; `demo` is SmolLM2-135M-Instruct"
Model = Annotated[str, typer.Argument(help=f"{_MODEL}.", show_default=False)]
ModelOrInvite = Annotated[
    str | None,
    typer.Argument(help=f"{_MODEL}; if not given, the model of --invite.", show_default=False),
]


def _join(help: str) -> Any:
    return in_swarm.shared("--join", metavar="ADDR", callback=checked_addresses, help=help)


Join = Annotated[
    list[str] | None,
    _join("Address that a peer of the swarm prints; repeat for several. By default this network is searched."),
]
JoinIfAny = Annotated[
    list[str] | None,
    _join("Address of a swarm to join; by default a swarm on this network is joined, or a new one starts."),
]
Lan = Annotated[bool, in_swarm.shared("--lan/--no-lan", help="Search this network for the swarm without --join.")]
JoinToExamine = Annotated[
    list[str] | None, _join("Address of a swarm, to check the connection; repeat for several of one swarm.")
]
CodecName = Annotated[
    str,
    in_route.shared(
        "--codec",
        callback=_checked_codec,
        help="Encoding of activations on links: auto, or a name from docs/codecs.md such as int8.",
    ),
]
Device = Annotated[
    str,
    in_computing.shared(
        "--device",
        metavar="DEVICE",
        callback=_checked_device,
        help="Where to compute: auto (CUDA or ROCm, else MPS, else XPU, else the CPU), cpu, cuda, cuda:1, mps or xpu.",
    ),
]


def one_identity(context: typer.Context, value: Path | None) -> Path | None:
    """Refuses keys on the command line together with an invitation, which replaces keys that are set elsewhere.

    The callback of all three options, because click may process these options in any order.
    """
    names = ("invite", "swarm_key", "key_file")
    invited, *keys = (getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in names)
    for option, source in zip(("--swarm-key", "--key-file"), keys, strict=True):
        if invited != "DEFAULT" and source == "COMMANDLINE":
            raise SplitnetError(f"an invitation already contains keys: leave out {option} or --invite")
    return value


SwarmKeyFile = Annotated[
    Path | None,
    in_keys.shared(
        "--swarm-key",
        metavar="FILE",
        callback=one_identity,
        help="File with the key of a closed swarm, see `splitnet key --swarm-key`.",
    ),
]
InviteFile = Annotated[
    Path | None,
    in_keys.shared(
        "--invite",
        metavar="FILE",
        callback=one_identity,
        help="File from `splitnet invite`, with model, addresses, swarm key and key; the file replaces these options.",
    ),
]
RelayPort = Annotated[
    int | None,
    in_network(
        "--relay-port",
        metavar="PORT",
        min=0,
        max=65535,
        help="Port at which this machine relays connections to peers behind routers; 0: any free port.",
    ),
]
RelayRate = Annotated[
    str | None, in_network("--relay-rate", metavar="32MiB", help="Maximum bytes per second to relay, in total.")
]


def parse_relay_rate(rate: str | None, port: int | None) -> int | None:
    if rate is None:
        return None
    if port is None:
        raise typer.BadParameter("--relay-rate is for --relay-port, which is not given")
    parsed = parse_bytes(rate)
    if not parsed:
        raise typer.BadParameter("--relay-rate 0 relays nothing: give more, or leave out --relay-port")
    return parsed


def _checked_model_id(model_id: str | None) -> str | None:
    if model_id is not None and not re.fullmatch(r"[0-9a-f]{64}", model_id):
        raise SplitnetError(
            f"{model_id!r} is not the id of a model: copy all 64 digits that `splitnet status --json` shows"
        )
    return model_id


ModelId = Annotated[
    str | None,
    in_swarm(
        "--model-id",
        metavar="ID",
        callback=_checked_model_id,
        help="Required fingerprint of a model with missing files; `splitnet status --json` shows it.",
    ),
]
KeyFile = Annotated[
    Path | None,
    in_keys.shared("--key-file", callback=one_identity, help="File with the key of this machine."),
]


CONNECTING: dict[str, Any] = {
    "initial_peers": Join,
    "lan": Lan,
    "codec": CodecName,
    "recovery_timeout_s": Annotated[
        float, in_route("--wait", min=0, metavar="SECONDS", help="Time to wait for peers if blocks have no peer.")
    ],
    "any_weights": Annotated[
        bool | None,
        in_computing(
            "--any-weights/--same-weights",
            help="Whether a text may continue on peers that hold the weights in another format (int4 after float32) "
            "if no other peers are left; by default only with --codec auto.",
            show_default=False,
        ),
    ],
    "kv_at_least": Annotated[
        StrEnum("KVForms", get_args(KVForms)),
        in_computing.shared("--kv-at-least", help="Use only peers that hold KV caches in at least this many bits."),
    ],
    "device": Device,
    "local_blocks": Annotated[
        str | None,
        in_computing.shared(
            "--local-blocks",
            metavar="START:END",
            help="Blocks to run on this machine, without peers: ranges as in 0:2,28:30, or auto.",
        ),
    ],
    "local_weights": Annotated[
        str | None,
        in_computing.shared(
            "--local-weights",
            metavar="KIND",
            help="Format of the weights of local blocks and the head: auto, float32, float16, int8 or int4; by "
            "default auto, or as stored with --codec none.",
        ),
    ],
    "vision": Annotated[
        StrEnum("VisionPlace", get_args(Vision)),
        in_computing.shared(
            "--vision",
            help="Where images are read. local: here. peer: at peers with --vision, so that this machine needs no "
            "memory for the vision tower. auto: here, unless the tower needs over half of the free memory and a peer "
            "reads images.",
        ),
    ],
    "tokenizer": Annotated[
        str | None,
        _shared(
            typer.Option,
            "--tokenizer",
            metavar="MODEL",
            help="Hugging Face id or folder with the tokenizer, if the model has no usable one.",
        ),
    ],
    "prefer": Annotated[
        StrEnum("Preferred", get_args(Preference)),
        in_route.shared(
            "--prefer",
            help="Prefer routes with the lowest latency, the most tokens per second, or the least energy per token.",
        ),
    ],
    "prefixes": Annotated[
        StrEnum("Prefixes", get_args(Prefixes)),
        in_route.shared(
            "--prefixes",
            help="Whether peers store keys and values of prompts for later prompts with the same beginning: for later "
            "prompts of this key only, also of other keys in its group (set by the owner of a peer), or not at all.",
        ),
    ],
    "standby": Annotated[
        str | None,
        in_route.shared(
            "--standby",
            metavar="8MiB",
            help="Maximum bytes per second at which replicas copy the keys and values of sessions; a replica that "
            "replaces a hop then computes only the missing positions.",
        ),
    ],
    "audit": Annotated[
        float | None,
        in_route.shared(
            "--audit",
            metavar="PART",
            help="Part of the peers' work that is computed again, on this machine or, without the weights, by other "
            "peers; a peer that lies is named and not used any more. 0: no audits. Default: 0.01 for peers on other "
            "machines, if no list or swarm key says whom to trust.",
        ),
    ],
    "auditors": Annotated[
        Path | None,
        in_route.shared(
            "--auditors",
            metavar="FILE",
            help="Keys of the peers that may compute the work of other peers again, one per line, even if the weights "
            "are here; by default any peer.",
        ),
    ],
    "energy_slowdown": Annotated[
        float | None,
        in_route.shared(
            "--energy-slowdown",
            metavar="FACTOR",
            help="With --prefer energy: maximum time of a token, as a multiple of its time on the fastest route; by "
            "default 1.5.",
        ),
    ],
    "key_file": KeyFile,
    "swarm_key": SwarmKeyFile,
    "trusted_peers": Annotated[
        Path | None,
        in_keys.shared(
            "--trusted-peers",
            metavar="FILE",
            help="File with the keys of the peers to use, in the format of --authorized-keys; by default any peer.",
        ),
    ],
    "invite": InviteFile,
    "model_id": ModelId,
}
"""The options with which commands reach a model and its swarm: fields of `ConnectionOptions`, with their defaults."""


def connects(*, only: Collection[str] = (), without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Replaces a command's keyword-only parameter `connecting` with options for the fields of `ConnectionOptions`.

    only: names of the fields; empty: all fields. without: names of fields to leave out.
    """
    options: dict[str, inspect.Parameter] = {}
    for name, annotation in CONNECTING.items():
        if (not only or name in only) and name not in without:
            default = getattr(ConnectionOptions, name) or None
            options[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = list[inspect.Parameter]()
        for parameter in signature.parameters.values():
            parameters += options.values() if parameter.name == "connecting" else [parameter]

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in options if name in given}
            chosen = ConnectionOptions(**{name: value for name, value in chosen.items() if value is not None})
            command(**given, connecting=chosen)

        with_options.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        del with_options.__wrapped__  # `__signature__` applies instead of the command's signature
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def command_arguments(options: ConnectionOptions) -> list[str]:
    """The options that differ from their defaults, as arguments for another command."""
    arguments: list[str] = []
    for name, annotation in CONNECTING.items():
        value = getattr(options, name)
        if value == getattr(ConnectionOptions, name) or (options.invite and name in ("key_file", "swarm_key")):
            continue
        (option,) = annotation.__metadata__
        flag, _, opposite = option.default.partition("/")  # typer stores the flags in `default`
        if isinstance(value, bool):
            arguments.append(flag if value else opposite)
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            arguments += [flag, str(each)]
    return arguments


EXTRAS = {
    "plot": ("matplotlib",),
    "serve": ("fastapi", "h11", "llguidance", "PIL", "uvicorn"),
    "state": ("redis",),
    "tune": ("peft",),
}
"""The packages of each extra in pyproject.toml, which `pip install splitnet` does not install."""


def has(extra: str) -> bool:
    return all(find_spec(module) is not None for module in EXTRAS[extra])


def require(extra: str, what: str) -> None:
    """Raises SplitnetError with the installation command if packages of the extra are not installed."""
    if not has(extra):
        raise SplitnetError(f"{what} needs packages that are not installed: run `pip install 'splitnet[{extra}]'`")


def quiet_libraries() -> None:
    """Removes progress bars and advice of transformers and the hub client from the output of commands.

    Messages in the hub client's log are written once, like those of all other logs.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # If that variable is set, the client warns about transformers, which hides and shows progress bars.
    warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars", module="huggingface_hub")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    importlib.import_module("huggingface_hub.utils.logging")  # this import adds a handler
    logging.getLogger("huggingface_hub").handlers.clear()


def resolve_model(model: str) -> str:
    """The checkpoint that a model argument names; `demo` prepares the demo model."""
    from splitnet.checkpoint.demo import DEMO_NAME, demo_checkpoint

    quiet_libraries()
    if model != DEMO_NAME:
        return model
    from splitnet.cli.stage_progress import StageProgress

    with StageProgress() as progress:
        return str(demo_checkpoint(progress=progress.update))


def parse_blocks(text: str) -> tuple[int, int]:
    """Start and end of a range such as `0:10`, blocks 0 to 9."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise SplitnetError(f"{text!r} is not a range of blocks: write START:END, as 0:10 for blocks 0 to 9")
    return int(match[1]), int(match[2])


def parse_host_port(text: str) -> tuple[str, int]:
    """Host and port of a text such as `9100` (this machine only), `0.0.0.0:9100` or `[::]:9100`."""
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):)?(\d{1,5})", text.strip())
    if match is None or int(match[2]) > 65535:
        raise SplitnetError(f"{text!r} is not an address to listen at: write PORT or HOST:PORT; port 0: any free port")
    return (match[1] or "127.0.0.1").strip("[]"), int(match[2])
