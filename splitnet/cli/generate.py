"""`splitnet generate` and `splitnet chat`: one answer, or a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects, option_group, require, resolve_model
from splitnet.cli.invite import model_name
from splitnet.errors import AdapterError, SplitnetError
from splitnet.import_shims import import_models
from splitnet.logs import printable
from splitnet.session.options import ConnectionOptions

if TYPE_CHECKING:
    from splitnet.cli.connection import ModelConnection

in_answer = option_group("Answer")

GENERATED, ANSWERED = 256, 512  # Default maximum of tokens of a generated text, and of an answer in a chat
MaxNewTokens = Annotated[
    int | None,
    in_answer(
        min=1,
        help=f"Maximum number of tokens to generate; by default {GENERATED} ({ANSWERED} in a chat), or all that fit.",
    ),
]
Temperature = Annotated[float, in_answer(min=0, help="0 always chooses the likeliest token.")]
TopP = Annotated[float, in_answer(min=0, max=1, help="Sample from the likeliest tokens of this total probability.")]
Seed = Annotated[int | None, in_answer(help="Makes sampling repeatable.")]


def _has_adapter(folder: Path | None) -> Path | None:
    if folder is not None:
        require("tune", "--adapter")
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"there is no adapter in {folder}: give the folder that holds adapter_config.json")
    return folder


AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        callback=_has_adapter,
        help="Folder of an adapter in PEFT's format, such as LoRA or a prompt.",
    ),
]
Speculate = Annotated[
    str,
    in_answer(
        "--speculate",
        metavar="HOW",
        help="Source of drafts, which peers verify together: auto, prompt-lookup, mtp (blocks of the checkpoint), "
        "eagle=DIR (a head, see tune --draft-head), a small model with the same tokenizer, or off.",
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print route, speed, bytes and tokens per round trip, to stderr.")]


Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="PNG, JPEG, WebP or GIF image, shown to the model before the first text. Can be given several times.",
    ),
]


def _read_files(files: list[Path] | None) -> list[str]:
    if files:
        require("serve", "--image")
    from splitnet.images import image_file

    return [*map(image_file, files or ())]


def connection_to(model: str | None, connecting: ConnectionOptions) -> ModelConnection:
    """The connection to the given model, or to the model of the invitation. Imports the libraries for models."""
    checkpoint = resolve_model(model_name(model, connecting.invite))

    import_models()
    from splitnet.cli.connection import ModelConnection

    return ModelConnection(checkpoint, connecting)


@connects()
def generate(
    model: ModelOrInvite = None,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)] = None,
    *,
    connecting: ConnectionOptions,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    adapter: AdapterFolder = None,
    speculate: Speculate = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Apply the model's chat template, or use the bare text.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    image: Images = None,
    stats: Stats = False,
) -> None:
    """Generate text after PROMPT through the peers of a swarm, streaming to stdout."""
    if prompt is None and connecting.invite is not None:
        model, prompt = None, model  # the only argument is the prompt
    if prompt is None:
        raise typer.BadParameter("give MODEL and PROMPT; MODEL may be left out with --invite")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise SplitnetError("the prompt is empty: give some text")
    images = _read_files(image)
    connection = connection_to(model, connecting)
    from splitnet.cli.text_generator import SamplingOptions, TextGenerator, print_summary

    client = TextGenerator.connect(connection, adapter, speculate, sees_images=bool(images))
    with closing(client.model):
        asked = client.encode_prompt(text, chat=chat, system=system, images=images)
        with client.model.session() as cache:
            new_tokens = client.new_tokens(asked, max_new_tokens, GENERATED)
            answer = client.print_answer(asked, SamplingOptions(new_tokens, temperature, top_p, seed))
            if stats and cache.session is not None:
                print_summary(answer, cache.session)


@connects()
def chat(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    adapter: AdapterFolder = None,
    speculate: Speculate = "auto",
    image: Images = None,
    stats: Stats = False,
) -> None:
    """Chat with MODEL through the peers of a swarm; they keep the KV cache of the conversation."""
    images = _read_files(image)
    connection = connection_to(model, connecting)
    from splitnet.cli.text_generator import SamplingOptions, TextGenerator, print_summary

    client = TextGenerator.connect(connection, adapter, speculate, sees_images=bool(images))
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        typer.secho("/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer", dim=True)
    with closing(client.model), client.model.session() as cache:
        while (line := _read_line()) is not None:
            if line == "/reset":
                messages = list(start)
                continue
            asked = [*messages, {"role": "user", "content": line}]
            try:
                prompt = client.encode_chat(asked, images)
                new_tokens = client.new_tokens(prompt, max_new_tokens, ANSWERED)
                answer = client.print_answer(prompt, SamplingOptions(new_tokens, temperature, top_p, seed))
            except KeyboardInterrupt:
                typer.echo("\n(stopped)", err=True)
            except SplitnetError as error:
                if not sys.stdin.isatty():
                    raise
                typer.secho(f"\nerror: {printable(str(error))}", err=True, fg="red")
                typer.secho("the conversation is kept: fix this and repeat the message", err=True, dim=True)
            else:
                messages = [*asked, {"role": "assistant", "content": answer.text}]
                if stats and cache.session is not None:
                    print_summary(answer, cache.session)


def _read_line() -> str | None:
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if terminal:
                typer.echo()
            return None
        if line == "/exit":
            return None
        if line:
            return line
