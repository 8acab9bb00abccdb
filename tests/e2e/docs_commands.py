"""The commands in the documents: lines of code blocks that start with a program known to the tests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"curl", "make", "python", "splitnet"}
BACKSLASH = "\\"
SHELLS = {"bash", "console", "sh"}

_FENCE = re.compile(r"^\s*```\s*(\w*)")
_EXEMPT = re.compile(r"<!-- not run: (.+) -->")
_ANY_OF = re.compile(r"^(\w+)(\|[\w-]+)+$")


@dataclass(frozen=True)
class Command:
    """A command in a document.

    Attributes:
        place: file and line.
        words: split like in a shell, without `sudo`, `nice`, variables and the folder of the program.
        program: the first word.
    """

    place: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]


def documents() -> list[Path]:
    """All documents that show commands to users."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


def commands_of(document: Path) -> Iterator[Command]:
    """All commands of a document; see `commands_in`."""
    name = str(document.relative_to(ROOT))
    return commands_in(document.read_text(encoding="utf-8"), name, is_code=document.suffix == ".py")


def commands_in(text: str, name: str, *, is_code: bool = False) -> Iterator[Command]:
    """All commands of a text, in order.

    Args:
        name: name of the text, for the places of commands.
        is_code: the whole text is code, such as a program with commands in its docstring.

    Raises:
        ValueError: when a shell block has a line without a known program and without an exemption.
    """
    for number, line, for_shell in _code_lines(text, is_code=is_code):
        for part in line.split(" && "):
            words = _program_and_arguments(shlex.split(part, comments=True)) if _may_be_command(part) else []
            if words and words[0] in PROGRAMS:
                yield Command(f"{name}:{number}", tuple(words))
            elif for_shell and part.strip() and not part.strip().startswith("#"):
                raise ValueError(f"{name}:{number}: no test runs {part!r}: write <!-- not run: why --> above the block")


def python_blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Blocks of Python in a document: their place and code."""
    text = document.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield f"{document.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 1}", block[1]


def mentions_of(document: Path) -> Iterator[tuple[str, ...]]:
    """Inline code that begins with `splitnet` and a command: its words."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for mention in re.finditer(r"`(splitnet\s+[a-z][^`]*)`", text):
        yield tuple(mention[1].split())


def _may_be_command(line: str) -> bool:
    return any(word.rpartition("/")[2] in PROGRAMS for word in line.split())


def _program_and_arguments(words: list[str]) -> list[str]:
    """Drops words that only change how a program runs, and resolves the notation of a synopsis: `[--a B|C]` is `--a
    B`."""
    while words and (words[0] in {"sudo", "nice", "-n", "-10", "$"} or re.match(r"^[A-Z_]+=", words[0])):
        words = words[1:]
    if not words:
        return []
    program = words[0].rpartition("/")[2]
    bare = [word.strip("[]") if not word.startswith("{") else word for word in words[1:]]
    return [program, *(_ANY_OF.sub(r"\1", word) for word in bare)]


def _code_lines(text: str, *, is_code: bool) -> Iterator[tuple[int, str, bool]]:
    """Lines of code blocks with their continuations: number, line, whether it is a block for a shell."""
    language: str | None = None
    exempt = False
    for number, line in _logical_lines(text):
        fence = None if is_code else _FENCE.match(line)
        if fence:
            language = fence[1] if language is None else None
            exempt = exempt and language is not None
        elif is_code or language is not None or line.startswith("    "):
            if not exempt and language in (None, "", "text", *SHELLS):
                yield number, line, language in SHELLS
        elif line.strip():
            exempt = bool(_EXEMPT.fullmatch(line.strip()))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. A backslash continues a line, and a line that begins with `[-` continues a synopsis."""
    pending, began = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if pending and (pending.endswith(BACKSLASH) or line.lstrip().startswith("[-")):
            pending = f"{pending.removesuffix(BACKSLASH).rstrip()} {line.strip()}"
        else:
            if began:
                yield began, pending
            pending, began = line, number
    yield began, pending
