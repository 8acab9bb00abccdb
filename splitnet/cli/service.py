"""`splitnet service`: a peer that systemd starts with the machine."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from splitnet.errors import SplitnetError

NAME = "splitnet-peer.service"
TIMEOUT_S = 60
UNIT = """\
[Unit]
Description=splitnet: peer that serves blocks of a model
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
TimeoutStartSec=infinity
WatchdogSec=60
WorkingDirectory={folder}
{environment}ExecStart={command}
Restart=on-failure
RestartSec=5
SuccessExitStatus=143
KillMode=mixed
TimeoutStopSec=30
LimitNOFILE=65536
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


class Action(StrEnum):
    install = "install"
    status = "status"
    remove = "remove"


def service(
    context: typer.Context,
    action: Annotated[Action, typer.Argument(help="What to do.", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL [OPTIONS]]",
            help="For install: MODEL and the options of `splitnet peer`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Keep a peer running on this machine: systemd starts it with the machine, and again when it fails.

    `install` writes a unit of this user, checks it, and starts the peer in the folder of the shell, with its variables
    `SPLITNET_...` and `HF_...`. Another `install` replaces it. `status` shows the unit and its last lines; `remove`
    stops the peer and deletes the unit. docs/deploy.md has units with a user of their own.
    """
    given = arguments or []
    file = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user" / NAME
    if action is not Action.install and given:
        raise typer.BadParameter(f"{action} takes no arguments")
    if action is Action.install:
        _install(context, file, given)
        return
    if not file.exists():
        raise SplitnetError(f"there is no {file}: `splitnet service install MODEL` writes it")
    if action is Action.status:
        sys.stdout.flush()
        raise typer.Exit(subprocess.call(["systemctl", "--user", "--no-pager", "status", NAME]))
    _systemctl("disable", "--now", NAME)
    file.unlink()
    _systemctl("daemon-reload")
    typer.echo(f"the peer has left, and {file} is deleted")


def _install(context: typer.Context, file: Path, given: list[str]) -> None:
    root: Any = context.find_root()
    # Wrong options end this command as they would end that of the peer.
    asked = root.command.get_command(root, "peer").make_context("peer", list(given), parent=root).params
    if not asked["model"] and not asked["invite"]:
        raise typer.BadParameter("name a model, as in `splitnet service install MODEL`")
    before = ["--config", str(root.params["config"])] if root.params["config"] else []
    command = [sys.executable, "-m", "splitnet", *before, "peer", *given]
    if shutil.which("systemctl") is None:
        raise SplitnetError(
            "this machine has no systemd: have launchd, Task Scheduler or a service of its kind run, in "
            f"{Path.cwd()}: {shlex.join(command)}"
        )
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        raise SplitnetError("a peer should not run as root: run this as another user, or see docs/deploy.md for units")
    variables = {name: value for name, value in os.environ.items() if name.startswith(("SPLITNET_", "HF_"))}
    text = UNIT.format(
        folder=str(Path.cwd()).replace("%", "%%"),
        environment="".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in sorted(variables.items())),
        command=" ".join(_quoted(word).replace("$", "$$") for word in command),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    before_text = file.read_text(encoding="utf-8") if file.exists() else None
    file.touch(mode=0o600)  # a variable may be a secret
    file.write_text(text, encoding="utf-8")
    try:
        _run("systemd-analyze", "--user", "verify", "--man=no", str(file))
        _systemctl("daemon-reload")
        _systemctl("enable", NAME)
    except SplitnetError:
        if before_text is None:
            file.unlink()
        else:
            file.write_text(before_text, encoding="utf-8")
        raise
    # The peer may load and measure its blocks for minutes.
    _systemctl("restart", "--no-block", NAME)
    typer.echo(f"{file} starts the peer now and with this machine; `splitnet service status` shows it")
    try:
        _run("loginctl", "enable-linger")
    except SplitnetError as error:
        command = f"loginctl enable-linger {getpass.getuser()}"
        typer.echo(f"it runs only while you are logged in ({error}): as root, run `{command}`", err=True)


def _quoted(word: str) -> str:
    """A word of a unit, see systemd.syntax(7)."""
    if any(ord(char) < 32 for char in word):
        raise SplitnetError(f"{word!r} contains a control character, which units cannot: leave it out")
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _systemctl(*arguments: str) -> None:
    _run("systemctl", "--user", *arguments)


def _run(*command: str) -> None:
    """Raises SplitnetError with the last line of the command's errors if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SplitnetError(f"`{shlex.join(command)}` did not run ({error})") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise SplitnetError(f"`{shlex.join(command)}` failed: {lines[-1]}")
