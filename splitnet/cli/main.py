"""The command `splitnet`: its subcommands, and its exit on errors."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.audit import audit
from splitnet.cli.compress import compress
from splitnet.cli.configuration import CONFIG_VARIABLE, ConfigurableGroup, read_configuration
from splitnet.cli.demo import demo
from splitnet.cli.dht import dht
from splitnet.cli.generate import chat, generate
from splitnet.cli.invite import invite, key
from splitnet.cli.models import models
from splitnet.cli.peer import peer
from splitnet.cli.run import run
from splitnet.cli.serve import serve
from splitnet.cli.service import service
from splitnet.cli.status import status
from splitnet.errors import DirectoryError, NotAuthorized, PeerLost, SplitnetError
from splitnet.import_shims import claim_process
from splitnet.logs import LogFormat, set_up, write_user_message
from splitnet.process import ENDING
from splitnet.version import __version__

_ABSENT = "Not installed; prints how to install it."
_OURS = ("peers", "scheduler", "simulator", "splitnet")


def optional_command(entry: str) -> Callable[..., None]:
    """Returns the command `MODULE:FUNCTION` of a tool that no other module imports.

    If the module or a library is missing, or another module has the same name, returns a command that reports the
    problem. Any other error is a bug of splitnet, and is raised.
    """
    module, _, name = entry.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.partition(".")[0] in _OURS and not f"{module}.".startswith(f"{missing}."):
            raise
        reason = str(error)
    else:
        if hasattr(found, name):
            return getattr(found, name)
        reason = f"it has no {name}"

    def absent(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        raise SplitnetError(
            f"this command needs {module}, which cannot be imported ({reason}): install splitnet again, in an "
            "environment of its own (`pip install splitnet`; in its repository `pip install -e .`)"
        )

    absent.__name__, absent.__doc__ = name, _ABSENT
    return absent


bench = optional_command("splitnet.tools.bench:bench")
doctor = optional_command("splitnet.tools.doctor:doctor")
plan = optional_command("splitnet.tools.plan:plan")
simulate = optional_command("simulator.command:simulate")
tune = optional_command("splitnet.tools.tune:tune")
joint_round = optional_command("splitnet.tools.tune:round")

app = typer.Typer(
    name="splitnet",
    cls=ConfigurableGroup,
    help="Run a model that is too big for any one device across many.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
EXAMPLES: dict[Callable[..., None], tuple[str, str]] = {
    run: ("splitnet run Qwen/Qwen3-8B", 'splitnet run demo "Why is the sky blue?" --serve --memory 4GiB'),
    peer: ("splitnet peer Qwen/Qwen3-8B --memory 8GiB", "splitnet peer ./llama.gguf --blocks 0:16 --join /ip4/..."),
    generate: (
        'splitnet generate Qwen/Qwen3-8B "Why is the sky blue?"',
        'splitnet generate demo "Write a haiku." --join /ip4/... --temperature 0.8 --stats',
    ),
    chat: ("splitnet chat Qwen/Qwen3-8B", 'splitnet chat demo --join /ip4/... --system "Answer in one sentence."'),
    service: ("splitnet service install Qwen/Qwen3-8B --memory 8GiB --join /ip4/...", "splitnet service status"),
    serve: ("splitnet serve Qwen/Qwen3-8B", "splitnet serve demo --join /ip4/... --host 0.0.0.0 --api-key-file keys"),
    tune: (
        "splitnet tune Qwen/Qwen3-8B --data chats.jsonl --output my-adapter",
        "splitnet tune Qwen/Qwen3-8B --data chats.jsonl --output my-adapter --steps 500 --rank 16 --resume",
    ),
    joint_round: (
        "splitnet round start birds Qwen/Qwen3-8B --join /ip4/... --output birds --owners 5",
        "splitnet round status birds Qwen/Qwen3-8B --join /ip4/...",
    ),
    status: ("splitnet status Qwen/Qwen3-8B", "splitnet status demo --join /ip4/... --json"),
    models: ("splitnet models --join /ip4/...", "splitnet models --json"),
    doctor: ("splitnet doctor", "splitnet doctor Qwen/Qwen3-8B --join /ip4/... --listen tcp://0.0.0.0:31331"),
    bench: ("splitnet bench demo --local", "splitnet bench Qwen/Qwen3-8B --join /ip4/... --prefill 2048 --rounds 5"),
    plan: (
        "splitnet plan Qwen/Qwen3-8B --devices devices.yaml",
        "splitnet plan Qwen/Qwen3-8B --devices devices.yaml --for throughput --json",
    ),
    dht: ("splitnet dht --listen /ip4/0.0.0.0/tcp/31330", "splitnet dht --join /ip4/... --relay-port 31331"),
    key: ("splitnet key", "splitnet key --swarm-key swarm.key"),
    invite: (
        "splitnet invite MODEL --join tcp://... --swarm-key swarm.key --authorized-keys keys.txt --output anna.invite",
        "splitnet invite MODEL --join tcp://... --swarm-key swarm.key --authorized-keys keys.txt --output b.invite "
        "--name bob --options kv=8GiB",
    ),
    compress: (
        "splitnet compress Qwen/Qwen3-8B --output qwen3-8b-4-bits",
        "splitnet compress ./my-model --bits 3 --text chats.txt --output my-model-3-bits",
    ),
    audit: (
        "splitnet audit Qwen/Qwen3-8B sn1....evidence",
        "splitnet audit ./llama.gguf ~/.cache/splitnet/audits/.../sn1....evidence",
    ),
    demo: ("splitnet demo", 'splitnet demo Qwen/Qwen3-0.6B --peers 2 --prompt "Tell a joke."'),
    simulate: ("splitnet simulate --peers 200 --clients 200", "splitnet simulate --scenario heavy --against all"),
}
"""Examples of each command for `--help`; /ip4/... and tcp://... stand for the addresses that a peer prints."""

for command, shown in EXAMPLES.items():
    app.command(
        epilog="\n\n".join(("[bold]Examples[/bold]", *shown)),
        context_settings={"ignore_unknown_options": command is service or command.__doc__ == _ABSENT},
    )(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splitnet {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log events to stderr.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar=CONFIG_VARIABLE,
            callback=read_configuration,
            is_eager=True,
            help="Take options from this TOML file, see docs/configuration.md.",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Write the log as text, or as a JSON object per line, see docs/metrics.md.")
    ] = LogFormat.text,
) -> None:
    """Options before the command."""
    set_up(log_format, logging.INFO if verbose else logging.WARNING)


_DOCTOR_KNOWS = (DirectoryError, NotAuthorized, PeerLost)  # Errors whose cause `splitnet doctor` can find


def main() -> None:
    """Runs the command line. An error that the user can fix is printed as one sentence, with exit code 1."""
    claim_process()
    if sys.platform == "win32":  # pipes are not UTF-8 on Windows
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
    # By default, these signals end the process without cleanup. But the process must leave the swarm and stop its
    # child processes.
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_cleanly)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        text = machine_problem(error)
        if text is None and isinstance(error, SplitnetError):
            text = str(error)
            if isinstance(error, _DOCTOR_KNOWS):
                text = f"{text.rstrip('.')}; `splitnet doctor --join ADDR` looks for the cause"
        if text is None:
            raise
        write_user_message(logging.ERROR, text)
        sys.exit(1)


_ROOM = "free some space, or name a folder on another disk (SPLITNET_CACHE, HF_HUB_CACHE, TMPDIR)"
_FILES = "end programs with many open files, or raise the limit (`ulimit -n 4096`)"
_MEMORY = "end other programs, or give this one less, as with --memory and --kv-memory"
_OF_THE_MACHINE = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("your share of the disk is used up", _ROOM),
    errno.EFBIG: ("a file is larger than this system allows", "name a folder on another disk, or raise `ulimit -f`"),
    errno.EROFS: ("nothing can be written there", "name a folder elsewhere"),
    errno.EACCES: ("this user may not use it", "change its permissions, or name another"),
    errno.EPERM: ("this user may not use it", "change its permissions, or name another"),
    errno.EIO: ("the disk does not work", "see the log of the system, and use another disk"),
    errno.EMFILE: ("too many files and connections are open in this process", _FILES),
    errno.ENFILE: ("too many files are open on this machine", _FILES),
    errno.ENOMEM: ("there is not enough memory", _MEMORY),
}
# The form in which libraries in other languages report an error of the operating system.
_SAID = re.compile(r"\((?:os error|errno) (\d+)\)", re.IGNORECASE)


def machine_problem(error: BaseException) -> str | None:
    """The problem of this machine that ended a command, even if the error names another cause; else None."""
    cause: BaseException | None = error
    while cause is not None:
        number = errno.ENOMEM if isinstance(cause, MemoryError) else getattr(cause, "errno", None)
        if number is None and not isinstance(cause, SplitnetError) and (said := _SAID.search(str(cause))):
            number = int(said[1])
        if number in _OF_THE_MACHINE:
            what, fix = _OF_THE_MACHINE[number]
            if isinstance(error, SplitnetError) and os.strerror(number) in str(error):
                return None  # the text of the error already contains the reason and the fix
            file = getattr(cause, "filename", None)
            return f"{f'{file}: ' if file else ''}{what} ({os.strerror(number)}): {fix}"
        cause = cause.__cause__ or cause.__context__
    return None


def _exit_cleanly(number: int, frame: object) -> None:
    sys.exit(128 + number)
