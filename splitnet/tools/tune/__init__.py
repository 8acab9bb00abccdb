"""`splitnet tune`: fine-tune a model on one's own examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, as_arguments, box, connects, require, resolve_model
from splitnet.cli.invite import model_or_invited
from splitnet.errors import SplitnetError
from splitnet.session.options import ConnectionOptions
from splitnet.tools.tune.data import TEMPLATE
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.methods import AdapterOptions, Method, PromptNetwork, Schedule, Settings

in_data = box("Data")
in_training = box("Training")
in_adapter = box("Adapter")


@connects(without=("prefer", "energy_slowdown"))
def tune(
    data: Annotated[Path, in_data(metavar="FILE.jsonl", help="Examples, one JSON object per line.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the adapter and what belongs to it.")],
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    evaluation: Annotated[Path | None, in_data("--eval", metavar="FILE.jsonl", help="Held-out examples.")] = None,
    method: Annotated[Method, typer.Option(help="What to train.")] = Method.LORA,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
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
    directions: Annotated[int, in_training(min=1, help="Random directions per step of --zeroth-order.")] = 4,
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
) -> None:
    """Fine-tune a model on your examples: the adapter stays here, the blocks and their work with the peers.

    Examples are chats {"messages": [{"role": "user", "content": "..."}, ...]}, {"prompt": "...", "completion": "..."},
    classified texts {"text": "...", "label": "..."}, or plain {"text": "..."}; all of a file are of one form.
    """
    require("tune", "splitnet tune")
    TuningFolder(output).check_place(resume=resume)
    if "{text}" not in template:
        raise SplitnetError("the template has no {text}: write it where the text goes, as in '{text} Topic:'")
    if learning_rate == 0:
        raise SplitnetError("with --lr 0 nothing is learned: leave it out, or give a step size such as 1e-3")
    if warmup >= steps:
        raise SplitnetError(f"{warmup} steps of warm-up leave none of {steps}: lower --warmup or raise --steps")
    from splitnet.tools.tune.data import read_examples

    train = read_examples(data)
    held_out = read_examples(evaluation, train.form) if evaluation else None
    if train.form == "classification" and len(train.labels) < 2:
        raise SplitnetError(f"all examples have the label {train.labels[0]!r}: give others too, or there is no choice")
    if head and train.form != "classification":
        raise SplitnetError('--head tells labels, and the data has none: give {"text": "...", "label": "..."}')
    checkpoint = resolve_model(model_or_invited(model, connecting.invite))

    from splitnet.cli.connection import Connection
    from splitnet.tools.tune.job import Tuning

    named = tuple(name.strip() for name in (targets or "").split(",") if name.strip())
    options = AdapterOptions(tokens, init_text, projection, network, rank, alpha, named)
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
        max_length=max_length,
        eval_every=eval_every,
        save_every=save_every,
        output=output,
        resume=resume,
        way=[*([model] if model else []), *as_arguments(connecting)],
    )
    tuning.run(Connection(checkpoint, connecting))
