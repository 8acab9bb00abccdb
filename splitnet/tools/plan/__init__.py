"""`splitnet plan`: the best partition of a model over known devices, and the expected speed."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitnet.blocks.chosen_device import AUTO
from splitnet.cli.arguments import Model, quiet_libraries, resolve_model
from splitnet.cli.peer import Dtype, WeightKind
from splitnet.errors import SplitnetError
from splitnet.import_shims import import_models

if TYPE_CHECKING:
    from splitnet.tools.plan.planning import Plan, PlannedSpan

DEFAULT_CONTEXT = 2048
DEFAULT_PROMPT = 512
DEFAULT_SESSIONS = 8


Objective = StrEnum("Objective", ["latency", "throughput"])  # The quantity that the best partition optimizes
tokens = partial(typer.Option, min=1, metavar="TOKENS", show_default=False)


def plan(
    model: Model,
    devices: Annotated[
        Path, typer.Option(metavar="FILE", help="Devices and links, as in examples/devices.yaml.", show_default=False)
    ],
    objective: Annotated[
        Objective,
        typer.Option(
            "--for", help="latency: lowest time per token of one session. throughput: highest total of many sessions."
        ),
    ] = Objective.latency,
    context: Annotated[
        int | None,
        tokens(
            help=f"Length of a session that fits in each device; by default {DEFAULT_CONTEXT}, at most the model's."
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        tokens(help=f"Length of the prompt before the first token; by default {DEFAULT_PROMPT}, at most the context."),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help=f"Sessions that fit in each device; by default 1, or {DEFAULT_SESSIONS} with --for throughput.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type that blocks compute in; by default the checkpoint's.")
    ] = None,
    weights: Annotated[WeightKind | None, typer.Option(help="Format of the weights; by default as stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the best partition of MODEL over known devices, its speed, and the command for each device.

    Only the model's config is read, and headers of its files if it is quantized. docs/placement.md describes FILE and
    the computation of the figures.
    """
    import_models()
    from splitnet.tools.plan.devices_file import read_devices

    file = read_devices(devices)
    quiet_libraries()
    checkpoint = resolve_model(model)

    from splitnet.blocks.model_sizes import ModelSizes
    from splitnet.tools.plan.planning import Demand, ModelTooBig, make_plan

    sizes = ModelSizes.of(checkpoint, str(dtype) if dtype else None, str(weights) if weights else None)
    limit = sizes.max_positions
    if context is not None and limit is not None and context > limit:
        raise SplitnetError(f"{sizes.name} has a context of {limit} positions: use --context {limit} or less")
    context = context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    prompt = prompt or min(DEFAULT_PROMPT, context)
    if prompt > context:
        raise SplitnetError(f"a prompt of {prompt} tokens does not fit in a context of {context}: raise --context")
    many = objective is Objective.throughput
    demand = Demand(context, prompt, sessions or (DEFAULT_SESSIONS if many else 1), many)
    try:
        made = make_plan(sizes, file, demand)
    except ModelTooBig as error:
        if not as_json:
            raise
        missing = {"missing_blocks": error.missing_blocks, "missing_bytes": error.missing_bytes}
        typer.echo(json.dumps({"fits": False, "message": str(error), **missing}))
        raise typer.Exit(1) from None
    if weights is None and sizes.dtype == "float16":
        dtype = Dtype.float16  # by default, CPUs would compute in float32, with KV caches of twice the size
    commands = [_command(model, span, dtype, weights, joins=index > 0) for index, span in enumerate(made.spans)]
    if as_json:
        typer.echo(json.dumps(_as_json(made, commands)))
    else:
        _print(made, commands)


def _command(model: str, span: PlannedSpan, dtype: Dtype | None, weights: WeightKind | None, *, joins: bool) -> str:
    # The part of the used memory that is for KV caches.
    needed = span.memory_used - (span.device.memory - span.kv_memory)
    whole_mib = span.kv_memory // 2**20
    kv_memory = f"{whole_mib}MiB" if whole_mib * 2**20 >= needed else f"{span.kv_memory}B"
    words = ["splitnet", "peer", model, "--blocks", f"{span.start}:{span.end}", "--kv-memory", kv_memory]
    device, watts = span.device.torch_device, span.device.watts
    options = {
        "--device": None if device == AUTO else device,
        "--watts": f"{watts:.15g}" if watts else None,
        "--dtype": dtype and str(dtype),
        "--weights": weights and str(weights),
    }
    words += [word for option, value in options.items() if value for word in (option, value)]
    return shlex.join(words) + (" --join ADDR" if joins else "")


def _as_json(plan: Plan, commands: list[str]) -> dict[str, Any]:
    from splitnet.tools.plan.planning import joules_of

    return {
        "fits": True,
        "model": plan.sizes.name,
        "dtype": plan.sizes.dtype,
        "weights": plan.sizes.weights,
        "num_blocks": plan.sizes.num_blocks,
        "for": "throughput" if plan.demand.throughput else "latency",
        "context": plan.demand.context,
        "prompt": plan.demand.prompt,
        "client": plan.client,
        "client_ms_per_token": plan.client_ms,
        "devices": [
            {
                "name": span.device.name,
                "start": span.start,
                "end": span.end,
                "memory_used": span.memory_used,
                "memory": span.device.memory,
                "kv_memory_needed": span.kv_needed,
                "max_blocks": span.max_blocks,
                "ms_per_token": span.ms_per_token,
                "joules_per_token": span.joules_per_token,
                "command": command,
            }
            for span, command in zip(plan.spans, commands, strict=True)
        ],
        "links": [
            {"from": link.sender, "to": link.receiver, "latency_ms": link.latency_ms, "ms_per_token": link.ms_per_token}
            for link in plan.links
        ],
        "joules_per_token": joules_of(plan.spans),
        "tokens_per_s": plan.tokens_per_s,
        "first_token_ms": plan.first_token_ms,
        "longest_first_token_ms": plan.longest_first_token_ms,
        "left_out": dict(plan.left_out),
        "sessions": plan.sessions,
        "all_sessions_tokens_per_s": plan.all_tokens_per_s,
        "alone_tokens_per_s": dict(plan.alone),
        "all_devices_tokens_per_s": plan.everyone,
        "exact": plan.exact,
    }


def _print(plan: Plan, commands: list[str]) -> None:
    from splitnet.tools.plan.planning import device_table, link_table, summary, title

    typer.echo(title(plan))
    for text in (device_table(plan), link_table(plan)):
        typer.echo(f"\n{text}")
    typer.echo()
    for sentence in summary(plan):
        typer.echo(sentence)
    typer.echo("\nRun on each device (ADDR is the address that the first device prints):")
    for span, command in zip(plan.spans, commands, strict=True):
        typer.secho(f"  {span.device.name}:", bold=True)
        typer.echo(f"    {command}")
