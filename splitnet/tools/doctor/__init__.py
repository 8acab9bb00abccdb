"""`splitnet doctor`: checks this machine, and its connection to a swarm."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitnet.cli.arguments import (
    Device,
    InviteFile,
    JoinToExamine,
    KeyFile,
    Lan,
    ModelOrInvite,
    SwarmKeyFile,
    resolve_model,
)
from splitnet.cli.configuration import given_options
from splitnet.cli.invite import model_name, with_invitation
from splitnet.errors import SplitnetError
from splitnet.import_shims import import_models
from splitnet.session.options import ConnectionOptions

if TYPE_CHECKING:
    from splitnet.tools.doctor.machine_checks import CheckResult

_COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}
_CHECK_WIDTH = 10


def doctor(
    command: typer.Context,
    model: ModelOrInvite = None,
    join: JoinToExamine = None,
    lan: Lan = True,
    listen: Annotated[
        str | None,
        typer.Option(metavar="tcp://HOST:PORT", help="Address of a peer on this machine that others must reach."),
    ] = None,
    public_host: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Name and port at which others reach it, if they differ.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Length of a session in tokens: checks whether such a session fits, and how fast it is.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    key_file: KeyFile = None,
    swarm_key: SwarmKeyFile = None,
    invite: InviteFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a report for developers, or print it with -: versions, hardware, results of checks, names of "
            "options, without addresses, keys, prompts, and names of folders, users and machines.",
        ),
    ] = None,
) -> None:
    """Check this machine, a MODEL and the connection to a swarm; report problems and their fixes.

    Ends with exit code 1 if a check has failed. docs/doctor.md lists the checks.
    """
    given = ConnectionOptions(
        initial_peers=join or (), lan=lan, device=device, key_file=key_file, swarm_key=swarm_key, invite=invite
    )
    options = with_invitation(given)
    source = resolve_model(model_name(model, invite)) if model or invite else None
    if context is not None and source is None:
        raise SplitnetError("--context needs a model: give MODEL, too")

    import_models()
    from splitnet.tools.doctor.examination import Setup, examine

    setup = Setup(model=source, options=options, listen=listen, public_host=public_host, context=context)
    findings: list[CheckResult] = []
    is_printed = report == Path("-")
    for finding in examine(setup):
        findings.append(finding)
        if not as_json and not is_printed:
            typer.secho(f"{finding.status:<5}", fg=_COLORS[finding.status], nl=False)
            typer.echo(f"{finding.check:<{_CHECK_WIDTH}} {finding.text}")
    if report is not None:
        from splitnet.tools.doctor.report import report as facts

        text = json.dumps(facts(findings, given_options(command, os.environ)), indent=2)
        if is_printed:
            typer.echo(text)
        else:
            try:
                report.write_text(f"{text}\n", encoding="utf-8")
            except OSError as error:
                raise SplitnetError(f"{report} cannot be written ({error.strerror}): give another --report") from None
    if not is_printed:
        typer.echo(json.dumps(document(findings)) if as_json else summary(findings))
    if has_failed(findings):
        raise typer.Exit(1)


def summary(findings: Sequence[CheckResult]) -> str:
    counts = Counter(str(finding.status) for finding in findings)
    passed, warned, failed = (counts[status] for status in _COLORS)
    told = f"{passed} passed, {warned} warned, {failed} failed"
    return f"{told}: docs/doctor.md has more on each check" if failed else told


def has_failed(findings: Sequence[CheckResult]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def document(findings: Sequence[CheckResult]) -> dict[str, Any]:
    return {"failed": has_failed(findings), "findings": [asdict(finding) for finding in findings]}
