"""`splitnet tune`: fine-tune a model on the user's examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from splitnet.cli.arguments import (
    CONNECTING,
    ModelOrInvite,
    command_arguments,
    connects,
    option_group,
    require,
    resolve_model,
)
from splitnet.cli.invite import model_name
from splitnet.errors import SplitnetError
from splitnet.limits import parse_bytes
from splitnet.session.options import ConnectionOptions
from splitnet.tools.tune.data import TEMPLATE
from splitnet.tools.tune.folder import WORK, TuningFolder
from splitnet.tools.tune.methods import AdapterOptions, Method, PromptNetwork, Schedule, TrainingSettings

in_data = option_group("Data")
in_drafts = option_group("Draft head")
in_training = option_group("Training")
in_adapter = option_group("Adapter")
in_gradients = option_group("Gradients")


_OF_DRAFT_HEADS = {"data", "output", "model", "resume", "max_length", "learning_rate", "seed", "draft_head"}
_OF_DRAFT_HEADS |= {"generate", "epochs", "draft_vocabulary", "states_limit", *CONNECTING}
_NOT_PLANNED = {"join_round", "output", "resume", "method", "learning_rate", "eval_every", "save_every"}
_NEEDS = {
    **dict.fromkeys(("rank", "alpha", "targets"), ("--method lora",)),
    "tokens": ("--method prompt", "--method prefix", "--method p-tuning"),
    "init_text": ("--method prompt", "--method prefix without --projection"),
    "projection": ("--method prefix", "--method p-tuning"),
    "network": ("--method p-tuning",),
    "width": ("--method side",),
    "states_limit": ("--method side", "--draft-head"),
    **dict.fromkeys(("generate", "epochs", "draft_vocabulary"), ("--draft-head",)),
    "directions": ("--zeroth-order",),
    "eval_every": ("--eval",),
}
"""Options that have an effect in some runs only, by parameter; a run needs one of the listed options for them."""


@connects(without=("prefer", "energy_slowdown", "kv_at_least", "prefixes", "standby", "audit", "vision"))
def tune(
    context: typer.Context,
    model: ModelOrInvite = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for the adapter and the files of the run.")
    ] = None,
    *,
    connecting: ConnectionOptions,
    data: Annotated[Path | None, in_data(metavar="FILE.jsonl", help="Examples, one JSON object per line.")] = None,
    evaluation: Annotated[Path | None, in_data("--eval", metavar="FILE.jsonl", help="Held-out examples.")] = None,
    method: Annotated[Method, typer.Option(help="Method of tuning, see docs/tuning.md.")] = Method.LORA,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    join_round: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train together with other owners, see `splitnet round`.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure some steps of every method, print the cost of a run, and exit.")
    ] = False,
    template: Annotated[str, in_data(help="Prompt for a text with a label.")] = TEMPLATE,
    head: Annotated[
        bool, in_data("--head", help="Train a head that predicts labels; by default the model's words predict labels.")
    ] = False,
    max_length: Annotated[
        int | None, in_data(min=2, help="Maximum tokens per example; by default 1024, if the model has room.")
    ] = None,
    steps: Annotated[int, in_training(min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[
        float | None, in_training("--lr", min=0, help="Maximum learning rate; the default depends on the method.")
    ] = None,
    batch_size: Annotated[int, in_training(min=1, help="Examples per step.")] = 8,
    accumulate: Annotated[int, in_training(min=1, help="Parts into which a step is cut, to save local memory.")] = 1,
    schedule: Annotated[Schedule, in_training(help="Schedule of the learning rate.")] = Schedule.LINEAR,
    warmup_steps: Annotated[int, in_training("--warmup", min=0, help="Steps in which the learning rate rises.")] = 0,
    clip: Annotated[float, in_training(min=0, help="Maximum norm of a gradient; 0: no limit.")] = 1.0,
    weight_decay: Annotated[float, in_training(min=0, help="Weight decay of AdamW.")] = 0.0,
    zeroth_order: Annotated[bool, in_training("--zeroth-order", help="Train with forward passes only (MeZO).")] = False,
    directions: Annotated[
        int, in_training(min=1, help="Directions of --zeroth-order; N directions take N + 1 passes per step.")
    ] = 4,
    seed: Annotated[int, in_training(min=0, max=2**31, help="Makes training repeatable.")] = 0,
    eval_every: Annotated[int, in_training(min=0, help="Steps between evaluations; 0: only at both ends.")] = 0,
    save_every: Annotated[int, in_training(min=1, help="Steps between checkpoints.")] = 25,
    rank: Annotated[int, in_adapter(min=1, help="Rank of LoRA.")] = 8,
    alpha: Annotated[int, in_adapter(min=1, help="Alpha of LoRA: scale times rank.")] = 16,
    targets: Annotated[str | None, in_adapter(help="Layers for LoRA, such as q_proj,v_proj, or all-linear.")] = None,
    tokens: Annotated[int, in_adapter(min=1, max=512, help="Virtual tokens of prompt, prefix and p-tuning.")] = 16,
    init_text: Annotated[
        str | None, in_adapter(help="Initial text of prompt or prefix; by default an instruction.")
    ] = None,
    projection: Annotated[
        int | None, in_adapter(min=1, help="Width of the network that generates the prefix or the p-tuning prompt.")
    ] = None,
    network: Annotated[PromptNetwork, in_adapter(help="Network of p-tuning.")] = PromptNetwork.MLP,
    width: Annotated[int | None, in_adapter(min=32, help="Width of a side network; default: model's / 4.")] = None,
    draft_head: Annotated[
        bool, in_drafts("--draft-head", help="Instead of an adapter, train an EAGLE head for --speculate eagle=DIR.")
    ] = False,
    generate: Annotated[
        int | None,
        in_drafts(min=1, metavar="N", help="Learn from N texts of the model: answers to the data, or to own prompts."),
    ] = None,
    epochs: Annotated[int, in_drafts(min=1, help="Passes over the texts.")] = 8,
    draft_vocabulary: Annotated[
        int, in_drafts(min=16, help="Number of tokens that the head can draft, the most frequent.")
    ] = 8192,
    states_limit: Annotated[
        str, in_drafts(metavar="4GiB", help="Disk space for hidden states, also of --method side.")
    ] = "4GiB",
) -> None:
    """Fine-tune a model on your examples: the adapter stays on this machine, and peers run the blocks.

    Examples are chats {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "completion": "..."},
    classified texts {"text": "...", "label": "..."}, or plain {"text": "..."}; all examples of a file have one form.
    Messages of the user may have images, see docs/tuning.md.

    With --draft-head, a head that drafts tokens for --speculate is trained, with forward passes only. With --generate,
    examples are prompts, {"prompt": "..."} or chats that end with the user; without any, the model writes them.
    """
    _check_options(context)
    if data is None and not generate:
        more = ", or have N texts written with --generate N" if draft_head else ""
        raise SplitnetError(f"there is nothing to learn from: give examples with --data FILE.jsonl{more}")
    if learning_rate == 0:
        raise SplitnetError("with --lr 0 nothing is learned: leave it out, or give a learning rate such as 1e-3")
    if output is None and not plan:
        raise SplitnetError("the trained adapter needs a folder: give --output DIR, or ask for the cost with --plan")
    output = output or Path()
    from splitnet.tools.tune.data import read_examples

    given: dict[str, Any] = {"output": output, "resume": resume, "max_length": max_length}
    given["states_limit"] = parse_bytes(states_limit)
    given["join_args"] = [*([model] if model else []), *command_arguments(connecting)]
    if draft_head:
        work = output / WORK
        if not resume and output.is_dir() and any(path != work for path in output.iterdir()):
            again = "a head: continue it with --resume, or" if work.is_dir() else "files:"
            raise SplitnetError(f"{output} already holds {again} give another --output")
        TuningFolder(work).check_place(resume=resume)
        texts = read_examples(data, answered=not generate) if data is not None else None
        if texts is not None and generate and texts.form in ("text", "classification"):
            raise SplitnetError(f"--generate answers prompts, and {data} holds texts: leave one of them out")
        if texts is not None and (texts.form == "classification" or texts.has_images):
            raise SplitnetError(
                'draft heads learn no labels and no images: give {"text": "..."}, chats or prompts with completions'
            )
        checkpoint = resolve_model(model_name(model, connecting.invite))

        from splitnet.cli.connection import ModelConnection
        from splitnet.tools.tune.draft_head import LEARNING_RATE, DraftHeadTuning

        DraftHeadTuning(
            texts=texts,
            generate=generate or 0,
            epochs=epochs,
            draft_vocabulary=draft_vocabulary,
            learning_rate=learning_rate or LEARNING_RATE,
            seed=seed,
            **given,
        ).run(ModelConnection(checkpoint, connecting))
        return
    assert data is not None
    if method is not Method.SIDE or plan:
        require("tune", "splitnet tune")
    if not plan:
        TuningFolder(output).check_place(resume=resume)
    if "{text}" not in template:
        raise SplitnetError("the template has no {text}: write it where the text goes, as in '{text} Topic:'")
    parts = 1 if zeroth_order and not head and method in (Method.PROMPT, Method.P_TUNING) else batch_size
    if accumulate > parts:
        raise SplitnetError(f"with these options, a step can be cut into at most {parts} parts: lower --accumulate")
    if warmup_steps >= steps:
        raise SplitnetError(
            f"{warmup_steps} steps of warm-up leave no other steps of {steps}: lower --warmup or raise --steps"
        )
    train = read_examples(data)
    held_out = read_examples(evaluation, train.form) if evaluation else None
    if train.form == "classification" and len(train.labels) < 2 and join_round is None:
        raise SplitnetError(f"all examples have the label {train.labels[0]!r}: give examples with other labels, too")
    if head and method is Method.SIDE:
        raise SplitnetError("--method side predicts labels with the model's words: leave out --head")
    if head and join_round is not None:
        raise SplitnetError("owners that train together predict labels with the model's words: leave out --head")
    given_options = dict(_given(context))
    option = "--head" if head else given_options.get("template")
    if train.form != "classification" and option:
        raise SplitnetError(f'{option} needs labels, and the data has none: give {{"text": "...", "label": "..."}}')
    checkpoint = resolve_model(model_name(model, connecting.invite))

    from splitnet.cli.connection import ModelConnection
    from splitnet.tools.tune.job import Tuning

    named = tuple(name.strip() for name in (targets or "").split(",") if name.strip())
    if targets is not None and not named:
        raise SplitnetError("--targets names no layer: leave it out, or give some as q_proj,v_proj")
    options = AdapterOptions(tokens, init_text, projection, network, rank, alpha, named, width)
    settings = TrainingSettings(
        steps=steps,
        learning_rate=learning_rate or method.learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        warmup_steps=warmup_steps,
        schedule=schedule,
        clip=clip,
        weight_decay=weight_decay,
        zeroth_order=zeroth_order,
        directions=directions,
        seed=seed,
    )
    tuning = Tuning(
        method=method,
        options=options,
        settings=settings,
        train=train,
        held_out=held_out,
        template=template,
        head=head,
        eval_every=eval_every,
        save_every=save_every,
        join_round=join_round,
        named=given_options,
        **given,
    )
    if zeroth_order and connecting.codec == "auto":
        connecting = replace(connecting, codec="fp16")  # errors of int8 would hide small differences of losses
    (tuning.plan if plan else tuning.run)(ModelConnection(checkpoint, connecting))


class Action(StrEnum):
    START = "start"
    STATUS = "status"
    END = "end"


@connects(only=("initial_peers", "lan", "key_file", "swarm_key", "invite", "model_id"))
def round(
    context: typer.Context,
    action: Annotated[Action, typer.Argument(help="Coordinate a joint tuning, show its progress, or end it early.")],
    name: Annotated[str, typer.Argument(help="Name that owners give: `splitnet tune --join-round NAME`.")],
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for the state from which --resume continues.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the rounds in the output folder.")] = False,
    owners: Annotated[
        int, typer.Option(min=1, max=256, help="Owners needed in the first round; later rounds need half.")
    ] = 2,
    listen: Annotated[
        str, typer.Option(metavar="tcp://HOST:PORT", help="Address at which owners connect.")
    ] = "tcp://0.0.0.0:0",
    public_host: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="Name and port at which owners reach this machine, if they differ."),
    ] = None,
    authorized_keys: Annotated[
        Path | None, typer.Option(help="File with the keys of the owners; by default anyone may take part.")
    ] = None,
    norm: Annotated[float, in_gradients(min=0, help="Maximum norm of a gradient; 0: twice the median.")] = 0.0,
    liars: Annotated[int, in_gradients(min=0, help="Dishonest owners to tolerate, by a median of means.")] = 0,
    noise: Annotated[
        float, in_gradients(min=0, help="Noise that owners add for privacy, as a multiple of --norm.")
    ] = 0.0,
    masked: Annotated[
        bool, in_gradients("--masked", help="Owners mask gradients, so that the coordinator sees only sums.")
    ] = False,
) -> None:
    """Let many owners tune one adapter: no owner sees another's examples, and this process averages the gradients.

    The owner that starts the rounds takes part like the others, with the same key; its options determine the training.
    """
    if not name.isprintable() or "@" in name.partition("@")[0] or not 0 < len(name.partition("@")[0]) <= 64:
        raise SplitnetError("the name of a round must have 1 to 64 printable characters: give another")
    if action is not Action.START:
        for given, option in _given(context):
            if given not in {"action", "name", "model", *CONNECTING}:
                raise SplitnetError(f"{option} is for `splitnet round start`: leave it out")
    elif output is None:
        raise SplitnetError("the averaged parameters need a folder: give --output DIR")
    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.cli.connection import ModelConnection
    from splitnet.tools.tune.coordinator import Coordinator
    from splitnet.tools.tune.owner import RoundLink
    from splitnet.tools.tune.rounds import RoundRules
    from splitnet.wire.messages import RoundWish

    rules = RoundRules(owners, norm, noise, masked, liars)
    connection = ModelConnection(resolve_model(model_name(model, connecting.invite)), connecting)
    facts = connection.facts_of(Checkpoint.open(connection.model))
    with connection.swarm_of(facts) as swarm:
        if action is Action.START:
            assert output is not None
            at = {"listen": listen, "public_host": public_host, "authorized": authorized_keys}
            Coordinator(swarm, name, rules, TuningFolder(output), resume=resume, **at).run()
            return
        with RoundLink(swarm, name) as link:
            state, _ = link.ask_round(RoundWish.END if action is Action.END else RoundWish.LOOK)
        told = f"{state.number} of {state.rounds or '?'} rounds are over"
        typer.echo(f"{told}; {state.owners} owners take part, {state.ready} are ready for the next round")


def _check_options(context: typer.Context) -> None:
    """Raises SplitnetError if a given option has no effect in such a run, or a number is not finite."""
    given = context.params
    methods = Method if given["plan"] else [] if given["draft_head"] else [given["method"]]
    run = {f"--method {method}" for method in methods}
    run |= set() if given["projection"] else {f"{each} without --projection" for each in run}
    flags = {"--draft-head": "draft_head", "--zeroth-order": "zeroth_order", "--eval": "evaluation"}
    run |= {flag for flag, name in flags.items() if given[name]}
    for parameter in context.command.params:
        value = given.get(parameter.name or "")
        if isinstance(value, float) and not math.isfinite(value):
            raise SplitnetError(f"{parameter.opts[0]} is {value}: give a finite number")
    for name, option in _given(context):
        if given["draft_head"] and name not in _OF_DRAFT_HEADS:
            raise SplitnetError(f"{option} has no effect with --draft-head: leave it out")
        if given["plan"] and name in _NOT_PLANNED:
            raise SplitnetError(f"{option} has no effect with --plan, which is for all methods: leave it out")
        if run.isdisjoint(needed := _NEEDS.get(name, run)):
            raise SplitnetError(f"{option} is for {' and '.join(needed)}: leave it out, or add what it needs")


def _given(context: typer.Context) -> Iterator[tuple[str, str]]:
    """The parameters that are given on the command line, with the names of their options."""
    for parameter in context.command.params if context.command else ():
        name = parameter.name or ""
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE":
            yield name, parameter.opts[0]
