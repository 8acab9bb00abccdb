"""Marks with which a model is asked for the text between a prefix and a suffix: one table for all model families."""

# ruff: noqa: RUF001 (marks have such characters)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class InfillMarks:
    """The tokens before the prefix, before the suffix, and at the gap (empty: there is no token at the gap)."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False


MARKS = (
    InfillMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 4
    InfillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code, StableCode
    InfillMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillMarks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    InfillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    InfillMarks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4.5
    InfillMarks("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
    InfillMarks("[PREFIX]", "[SUFFIX]", suffix_first=True),  # Codestral
)
REPOSITORIES = "<|repo_name|>", "<repo_name>", "<reponame>"
FILES = "<|file_sep|>", "<file_sep>", "<filename>"
OTHERS = "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "▁<EOT>", "<|EOT|>", "<|file_separator|>", "<|endoftext|>"
"""Other tokens that end the text that a model writes into a gap."""

SNIPPET = "\n\n--- snippet ---\n\n"
"""Separates the texts of other files, for models without a token for files."""

KNOWN = {*REPOSITORIES, *FILES, *OTHERS, *(text for each in MARKS for text in (each.prefix, each.suffix, each.middle))}


def marks_of(token_of: Callable[[str], int | None], named: Sequence[str]) -> InfillMarks | None:
    """The marks of a model; None: the model has no marks.

    token_of: returns the id of a token. named: the marks in the model's file (prefix, suffix, middle), or empty.
    """
    prefix, suffix, middle = named or ("", "", "")
    own = [row for row in MARKS if row.prefix == prefix] or [InfillMarks(prefix, suffix, middle)]
    rows = own if prefix and suffix else MARKS
    texts = {row: filter(None, (row.prefix, row.suffix, row.middle)) for row in rows}
    return next((row for row in rows if all(token_of(text) is not None for text in texts[row])), None)
