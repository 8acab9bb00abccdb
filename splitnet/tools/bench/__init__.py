"""`splitnet bench`: measures the speed of a swarm."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects, option_group
from splitnet.cli.generate import Speculate, connection_to
from splitnet.errors import SplitnetError
from splitnet.session.options import ConnectionOptions
from splitnet.tools.bench.report import cases_of

in_tests = option_group("Tests")
in_manner = option_group("How to measure")


@connects(without=("recovery_timeout_s", "tokenizer", "vision"))
def bench(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="Measure plain transformers in this process; with --join or --invite, both in turns."
        ),
    ] = False,
    prefill: Annotated[
        list[int] | None, in_tests(min=0, help="Tokens of a prompt; repeat for several, 0: none.", show_default="512")
    ] = None,
    decode: Annotated[int, in_tests(min=0, help="Tokens of an answer, after its first; 0: none.")] = 128,
    context: Annotated[
        list[int] | None,
        in_tests(min=0, help="Tokens in the KV cache before an answer; repeat for several.", show_default="0"),
    ] = None,
    clients: Annotated[
        list[int] | None,
        in_tests(min=1, max=256, help="Concurrent answers; repeat for several.", show_default="1"),
    ] = None,
    rounds: Annotated[int, in_manner(min=1, help="Rounds of all measurements.")] = 3,
    warm_up: Annotated[int, in_manner(min=0, help="Rounds before these, which do not count.")] = 1,
    threads: Annotated[
        int | None,
        in_manner(min=1, help="CPU threads of this process, for --local and the client part of the model."),
    ] = None,
    seed: Annotated[int, in_manner(min=0, max=2**31, help="Seed of the random tokens of prompts.")] = 0,
    speculate: Speculate = "off",
    as_json: Annotated[bool, typer.Option("--json", help="Print all rounds as JSON instead of a table.")] = False,
) -> None:
    """Measure how fast prompts are read and answers are generated, through a swarm, here, or both in turns.

    Prompts are random tokens. Answers have exactly the requested number of tokens, even if the model would end earlier.
    Such answers show little about drafts, so --speculate is off by default.
    """
    if not (connecting.initial_peers or connecting.lan or local or connecting.invite):
        raise SplitnetError(
            "there is nothing to measure: give --join ADDR for a swarm, --local for plain transformers here, or both"
        )
    cases = cases_of(prefill or [512], decode, context or [0], clients or [1])
    if not cases:
        raise SplitnetError("--prefill 0 and --decode 0 leave nothing to measure: give tokens to one of them")
    connection = connection_to(model, connecting)
    from splitnet.cli.text_generator import drafts_of
    from splitnet.tools.bench.backends import Benchmark

    drafts = drafts_of(speculate, connection)
    report = Benchmark(cases, rounds, warm_up, seed, threads, local, drafts).run(connection)
    if as_json:
        typer.echo(json.dumps(report.document()))
        return
    typer.echo(report.table())
    typer.echo(report.sentence())
