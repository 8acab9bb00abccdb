"""`splitnet tune`: fine-tune a model on one's own examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from splitnet.cli.arguments import CONNECTING, ModelOrInvite, as_arguments, box, connects, require, resolve_model
from splitnet.cli.invite import model_or_invited
from splitnet.errors import SplitnetError
from splitnet.limits import parse_bytes
from splitnet.session.options import ConnectionOptions
from splitnet.tools.tune.data import TEMPLATE
from splitnet.tools.tune.folder import WORK, TuningFolder
from splitnet.tools.tune.methods import AdapterOptions, Method, PromptNetwork, Schedule, Settings

in_data = box("Data")
in_drafts = box("Draft head")
in_training = box("Training")
in_adapter = box("Adapter")


_OF_BOTH = {"data", "output", "model", "resume", "max_length", "learning_rate", "seed", "draft_head"}
_OF_DRAFT_HEADS = {"generate", "epochs", "draft_vocabulary"}
_NOT_PLANNED = {"output", "resume", "method", "learning_rate", "eval_every", "save_every"}
_OF_STATES = {"states_limit"}  # of draft heads and side networks


@connects(without=("prefer", "energy_slowdown"))
def tune(
    context: typer.Context,
    model: ModelOrInvite = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for the adapter and what belongs to it.")
    ] = None,
    *,
    connecting: ConnectionOptions,
    data: Annotated[Path | None, in_data(metavar="FILE.jsonl", help="Examples, one JSON object per line.")] = None,
    evaluation: Annotated[Path | None, in_data("--eval", metavar="FILE.jsonl", help="Held-out examples.")] = None,
    method: Annotated[Method, typer.Option(help="What to train.")] = Method.LORA,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure some steps of every method, tell what a run would cost, and end.")
    ] = False,
    template: Annotated[str, in_data(help="What the model reads of a text with a label.")] = TEMPLATE,
    head: Annotated[
        bool, in_data("--head", help="Train a head that tells labels, instead of the model's words.")
    ] = False,
    max_length: Annotated[
        int | None, in_data(min=2, help="Tokens per example at most; 1024 if the model has room.")
    ] = None,
    steps: Annotated[int, in_training(min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[
        float | None, in_training("--lr", min=0, help="Largest step size; depends on the method.")
    ] = None,
    batch_size: Annotated[int, in_training(min=1, help="Examples per step.")] = 8,
    accumulate: Annotated[int, in_training(min=1, help="Parts to cut a step into, to save memory here.")] = 1,
    schedule: Annotated[Schedule, in_training(help="Of the learning rate.")] = Schedule.LINEAR,
    warmup: Annotated[int, in_training(min=0, help="Steps in which the learning rate rises.")] = 0,
    clip: Annotated[float, in_training(min=0, help="Largest norm of a gradient; 0: any.")] = 1.0,
    weight_decay: Annotated[float, in_training(min=0, help="As in AdamW.")] = 0.0,
    zeroth_order: Annotated[bool, in_training("--zeroth-order", help="Train by forward passes alone (MeZO).")] = False,
    directions: Annotated[
        int, in_training(min=1, help="Of --zeroth-order: so many and one passes a step; 1 takes 2.")
    ] = 4,
    seed: Annotated[int, in_training(min=0, max=2**31, help="Makes training repeatable.")] = 0,
    eval_every: Annotated[int, in_training(min=0, help="Steps between evaluations; 0: at both ends only.")] = 0,
    save_every: Annotated[int, in_training(min=1, help="Steps between checkpoints.")] = 25,
    rank: Annotated[int, in_adapter(min=1, help="Of LoRA.")] = 8,
    alpha: Annotated[int, in_adapter(min=1, help="Of LoRA: scale times rank.")] = 16,
    targets: Annotated[str | None, in_adapter(help="Layers for LoRA, as q_proj,v_proj; or all-linear.")] = None,
    tokens: Annotated[int, in_adapter(min=1, max=512, help="Virtual tokens of prompt, prefix and p-tuning.")] = 16,
    init_text: Annotated[
        str | None, in_adapter(help="What prompt or prefix begins as; an instruction if not given.")
    ] = None,
    projection: Annotated[
        int | None, in_adapter(min=1, help="Width of the network that makes prefix or p-tuning prompt.")
    ] = None,
    network: Annotated[PromptNetwork, in_adapter(help="Of p-tuning.")] = PromptNetwork.MLP,
    width: Annotated[int | None, in_adapter(min=32, help="Of a side network; a quarter of the model's.")] = None,
    draft_head: Annotated[
        bool, in_drafts("--draft-head", help="Train an EAGLE head, for --speculate eagle=DIR, instead of an adapter.")
    ] = False,
    generate: Annotated[
        int | None,
        in_drafts(min=1, metavar="N", help="Learn from N texts of the model: answers to the data, or to itself."),
    ] = None,
    epochs: Annotated[int, in_drafts(min=1, help="How often each text is learned from.")] = 8,
    draft_vocabulary: Annotated[int, in_drafts(min=16, help="Tokens that are drafted: the most frequent ones.")] = 8192,
    states_limit: Annotated[
        str, in_drafts(metavar="4GiB", help="Disk space for hidden states, also of --method side.")
    ] = "4GiB",
) -> None:
    """Fine-tune a model on your examples: the adapter stays here, the blocks and their work with the peers.

    Examples are chats {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "completion": "..."},
    classified texts {"text": "...", "label": "..."}, or plain {"text": "..."}; all of a file are of one form.

    With --draft-head, what is trained drafts tokens for --speculate, and the peers run forward only. With --generate,
    examples are prompts, {"prompt": "..."} or chats that end with the user; without any, the model writes them.
    """
    _check_options(context, draft_head, draft_head or method is Method.SIDE)
    if data is None and not generate:
        more = ", or have N texts written with --generate N" if draft_head else ""
        raise SplitnetError(f"there is nothing to learn from: give examples with --data FILE.jsonl{more}")
    if learning_rate == 0:
        raise SplitnetError("with --lr 0 nothing is learned: leave it out, or give a step size such as 1e-3")
    if plan:
        _refuse_with_plan(context)
    if plan and draft_head:
        raise SplitnetError("--plan is for adapters, and does not go with --draft-head: leave out one of them")
    if output is None and not plan:
        raise SplitnetError("there is no place for what is trained: give --output DIR, or ask for the cost with --plan")
    output = output or Path()
    from splitnet.tools.tune.data import read_examples

    given: dict[str, Any] = {"output": output, "resume": resume, "max_length": max_length}
    given["states_limit"] = parse_bytes(states_limit)
    given["way"] = [*([model] if model else []), *as_arguments(connecting)]
    if draft_head:
        work = output / WORK
        if not resume and output.is_dir() and any(path != work for path in output.iterdir()):
            again = "a head: --resume goes on with it, or" if work.is_dir() else "files:"
            raise SplitnetError(f"{output} already holds {again} give another --output")
        TuningFolder(work).check_place(resume=resume)
        texts = read_examples(data, answered=not generate) if data is not None else None
        if texts is not None and generate and texts.form in ("text", "classification"):
            raise SplitnetError(f"--generate answers prompts, and {data} holds texts: leave one of them out")
        if texts is not None and texts.form == "classification":
            raise SplitnetError('labels make no draft head: give {"text": "..."}, chats or prompts with completions')
        checkpoint = resolve_model(model_or_invited(model, connecting.invite))

        from splitnet.cli.connection import Connection
        from splitnet.tools.tune.draft_head import LEARNING_RATE, DraftHeadTuning

        DraftHeadTuning(
            texts=texts,
            generate=generate or 0,
            epochs=epochs,
            draft_vocabulary=draft_vocabulary,
            learning_rate=learning_rate or LEARNING_RATE,
            seed=seed,
            **given,
        ).run(Connection(checkpoint, connecting))
        return
    assert data is not None
    if method is not Method.SIDE or plan:
        require("tune", "splitnet tune")
    if not plan:
        TuningFolder(output).check_place(resume=resume)
    if "{text}" not in template:
        raise SplitnetError("the template has no {text}: write it where the text goes, as in '{text} Topic:'")
    if warmup >= steps:
        raise SplitnetError(f"{warmup} steps of warm-up leave none of {steps}: lower --warmup or raise --steps")
    train = read_examples(data)
    held_out = read_examples(evaluation, train.form) if evaluation else None
    if train.form == "classification" and len(train.labels) < 2:
        raise SplitnetError(f"all examples have the label {train.labels[0]!r}: give others too, or there is no choice")
    if head and method is Method.SIDE:
        raise SplitnetError("--method side has the model's words tell labels: leave out --head")
    if head and train.form != "classification":
        raise SplitnetError('--head tells labels, and the data has none: give {"text": "...", "label": "..."}')
    checkpoint = resolve_model(model_or_invited(model, connecting.invite))

    from splitnet.cli.connection import Connection
    from splitnet.tools.tune.job import Tuning

    named = tuple(name.strip() for name in (targets or "").split(",") if name.strip())
    options = AdapterOptions(tokens, init_text, projection, network, rank, alpha, named, width)
    settings = Settings(
        steps=steps,
        learning_rate=learning_rate or method.learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        warmup_steps=warmup,
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
        **given,
    )
    if zeroth_order and connecting.codec == "auto":
        connecting = replace(connecting, codec="fp16")  # in the errors of int8, small differences of losses drown
    (tuning.plan if plan else tuning.run)(Connection(checkpoint, connecting))


def _refuse_with_plan(context: typer.Context) -> None:
    """Raises SplitnetError: an option was given that says nothing of what a run costs, or of which method."""
    for name, option in _given(context):
        if name in _NOT_PLANNED:
            raise SplitnetError(f"{option} does not go with --plan, which is for all methods: leave it out")


def _check_options(context: typer.Context, draft_head: bool, states: bool) -> None:
    """Raises SplitnetError: an option was given that does not go with --draft-head, or only with that, or with states
    on the disk."""
    both = _OF_BOTH | _OF_STATES
    for name, option in _given(context):
        if name in _OF_STATES and not states:
            raise SplitnetError(f"{option} is for --method side and --draft-head: leave it out, or add one of them")
        if name not in both and name not in CONNECTING and (name in _OF_DRAFT_HEADS) != draft_head:
            way = "does not go with" if draft_head else "is for"
            raise SplitnetError(
                f"{option} {way} --draft-head: leave it out" + (", or add that" if not draft_head else "")
            )


def _given(context: typer.Context) -> Iterator[tuple[str, str]]:
    """What the command line has: the names of parameters, and of their options."""
    for parameter in context.command.params if context.command else ():
        name = parameter.name or ""
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE":
            yield name, parameter.opts[0]
