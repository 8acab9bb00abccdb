"""`splitnet invite`: writes and reads one file with which a friend's machine joins a closed swarm."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitnet.cli.arguments import KeyFile, ModelId, checked_addresses
from splitnet.errors import KeyFileError, SplitnetError
from splitnet.session.options import ConnectionOptions

if TYPE_CHECKING:
    from splitnet.security.identity import Identity
    from splitnet.security.swarm_key import SwarmKey

_ABOUT = """\
# An invitation to a swarm of splitnet. Anyone with this file can act as the invited person, so keep it secret:
#   splitnet generate --invite FILE "Why is the sky blue?"
#   splitnet peer --invite FILE
"""


@dataclass(frozen=True)
class Invite:
    """The content of an invitation."""

    model: str  # hub id, folder or file
    join: tuple[str, ...]  # addresses of peers
    swarm_key: SwarmKey
    identity: Identity  # the key of the invited person
    # Lines of a file of authorized keys, for a peer that the invited person runs; empty: not stated.
    authorized: tuple[str, ...] = ()
    model_id: str | None = None  # the fingerprint of the model; None: the model is found by its name

    @classmethod
    def load(cls, path: Path) -> Invite:
        """Reads an invitation.

        Raises KeyFileError if the file is invalid or others can read it, and DirectoryError if an address is invalid.
        """
        from splitnet.security.identity import Identity
        from splitnet.security.swarm_key import SwarmKey, read_secret_file

        text = read_secret_file(path)
        try:
            content: dict[str, Any] = tomllib.loads(text)
            model, join, authorized = content["model"], content["join"], content.get("authorized", [])
            model_id = content.get("model-id")
            if model_id is not None and (type(model_id) is not str or not re.fullmatch(r"[0-9a-f]{64}", model_id)):
                raise ValueError
            if type(model) is not str or not _are_texts(join) or not _are_texts(authorized):
                raise ValueError
            swarm_key, identity = SwarmKey.parse(str(content["swarm-key"])), Identity.parse(str(content["key"]))
        except (KeyError, ValueError, RecursionError):
            raise KeyFileError(f"{path} is not an invitation: ask for the file that `splitnet invite` wrote") from None
        except KeyFileError as error:
            raise KeyFileError(f"{path} is not an invitation: {error}") from None
        checked_addresses(join)
        return cls(model, tuple(join), swarm_key, identity, tuple(authorized), model_id)

    def save(self, path: Path) -> None:
        """Writes a new file that only its owner can read. Raises KeyFileError if writing fails, or the file exists."""
        from splitnet.security.swarm_key import write_secret_file

        fields = {"model": self.model, "swarm-key": self.swarm_key.secret_text, "key": self.identity.secret_text}
        if self.model_id is not None:
            fields["model-id"] = self.model_id
        lines = [f"{name} = {_quoted(value)}\n" for name, value in fields.items()]
        for name, texts in (("join", self.join), ("authorized", self.authorized)):
            lines.append(f"{name} = [{', '.join(map(_quoted, texts))}]\n")
        write_secret_file(path, _ABOUT + "".join(lines))

    def list_of_keys(self, path: Path) -> Path | None:
        """The file of authorized keys for a peer with the invitation in `path`; None: the invitation lists no clients.

        The file is next to `path`, and is created if missing. Clients that are not listed may also connect, with the
        lowest priority, because some clients may be invited later. Raises SplitnetError if the file cannot be written.
        """
        file = path.with_name(f"{path.name}.keys")
        if file.exists() or not self.authorized:
            return file if file.exists() else None
        lines = [*self.authorized]
        if not any("anyone" in line.split() for line in lines):
            lines.append("anyone # clients invited later; without this line only the clients above")
        try:
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise SplitnetError(
                f"{file} cannot be written ({error.strerror}): give --authorized-keys with the clients of this peer"
            ) from None
        return file


def with_invitation(options: ConnectionOptions) -> ConnectionOptions:
    """The options, with the addresses, keys and model id of their invitation. Raises the errors of `Invite.load`."""
    if options.invite is None:
        return options
    invite = Invite.load(options.invite)
    return replace(
        options,
        initial_peers=[*options.initial_peers, *invite.join],
        swarm_key=invite.swarm_key,
        identity=invite.identity,
        model_id=options.model_id or invite.model_id,
    )


def model_name(model: str | None, invite: Path | None) -> str:
    if model is not None:
        return model
    if invite is None:
        raise typer.BadParameter("give MODEL, or --invite")
    return Invite.load(invite).model


def invite(
    model: Annotated[str, typer.Argument(help="The model that the swarm serves, as for `splitnet peer`.")],
    output: Annotated[Path, typer.Option(help="The file to give to the invited person over a safe channel.")],
    join: Annotated[
        list[str],
        typer.Option(metavar="ADDR", callback=checked_addresses, help="Address of a peer, tcp://..., or several."),
    ],
    swarm_key: Annotated[Path, typer.Option(help="File with the key of the swarm, see `splitnet key --swarm-key`.")],
    authorized_keys: Annotated[
        Path, typer.Option(help="The --authorized-keys file of your peers; the new key is added, with --name.")
    ],
    name: Annotated[str, typer.Option(help="Name of the invited person, written after the new key.")] = "invited",
    model_id: ModelId = None,
    options: Annotated[
        str, typer.Option(metavar="kv=8GiB,...", help="Options of the key, see docs/network.md#who-may-take-part.")
    ] = "",
) -> None:
    """Invite somebody to a closed swarm: create a key, add it to the list of keys, and write an invitation file.

    To revoke the invitation, remove the line from the list.
    """
    from splitnet.security.identity import Identity, parse_options, without_names
    from splitnet.security.swarm_key import SwarmKey
    from splitnet.transport.addresses import check_peer_address, is_peer_address

    for address in join:
        if not is_peer_address(address):
            raise SplitnetError(f"a closed swarm is joined through peers: give --join tcp://..., not {address}")
    if not name.isprintable() or "#" in name or "=" in name or not name.strip():
        raise SplitnetError(f"{name!r} is not valid in a list of keys: give a --name without # and =")
    if options:
        parse_options(options)
    identity = Identity.generate()
    line = " ".join(part for part in (options, identity.public.text, name) if part)
    refusal = f"{authorized_keys} cannot be extended ({{}}): give another --authorized-keys"
    try:
        before = authorized_keys.read_text(encoding="utf-8") if authorized_keys.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SplitnetError(refusal.format(error)) from None
    listed = without_names(f"{before}\n{line}")
    # Peers connect to each other, so the peers of `--join` are listed, too.
    peers = dict.fromkeys(check_peer_address(address).text for address in join)
    listed += [peer for peer in peers if not any(peer in one.split() for one in listed)]
    Invite(model, tuple(join), SwarmKey.load(swarm_key), identity, tuple(listed), model_id).save(output)
    try:
        authorized_keys.parent.mkdir(parents=True, exist_ok=True)
        with authorized_keys.open("a", encoding="utf-8") as file:
            file.write(f"{'' if before.endswith(chr(10)) or not before else chr(10)}{line}\n")
    except OSError as error:
        output.unlink()
        raise SplitnetError(refusal.format(error)) from None
    typer.echo(f"{output} invites {name}: give it to them over a safe channel")
    typer.echo(f"to revoke it, remove the line of {identity.public.text} from {authorized_keys}")


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(type(one) is str and one.isprintable() for one in value)


def _quoted(text: str) -> str:
    if not text.isprintable() or "'" in text:
        raise SplitnetError(f"an invitation cannot contain {text!r}")
    return f"'{text}'"


def key(
    key_file: KeyFile = None,
    swarm_key: Annotated[
        Path | None, typer.Option(help="Create the key of a closed swarm in this new file, for its peers and clients.")
    ] = None,
) -> None:
    """Print the public key of this machine, for the --authorized-keys file of a private swarm."""
    from splitnet.security.identity import Identity
    from splitnet.security.swarm_key import SwarmKey

    if swarm_key is not None:
        SwarmKey.create(swarm_key)
        typer.echo(f"{swarm_key} holds a new swarm key: give it only to members, as `splitnet invite` does")
        return
    typer.echo(Identity.load_or_create(key_file).public.text)
