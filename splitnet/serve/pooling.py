"""Reads from a checkpoint how a text becomes one vector (an embedding), and whether the model is a reranker."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import SplitnetError, UnsupportedModel, replace_library_errors

_FILE_BYTES = 2**20  # Maximum number of characters that are read from a file that describes embeddings
_POOLING_MODES = {
    "cls": "the first token's state",
    "mean": "the mean of all states",
    "lasttoken": "the last token's state",
}
_GGUF_MODES = {1: "mean", 2: "cls", 3: "lasttoken"}  # as llama.cpp numbers them


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How a vector is computed from a text; by default the vector is the normalised state of the last token.

    refused: a clause that says why the model makes no embeddings; empty: the model makes embeddings. mode: see
    `_POOLING_MODES`. prompts: texts that are put before inputs, by name. most: maximum tokens of an input; None: no
    bound is known. reranks: the model is a reranker in the form of Qwen3-Reranker. told: the checkpoint describes its
    embeddings.
    """

    refused: str = ""
    mode: str = "lasttoken"
    normalizes: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    most: int | None = None
    reranks: bool = False
    told: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Pooling:
        """Reads the files of sentence-transformers in the checkpoint, or the metadata of a GGUF file."""
        try:
            with replace_library_errors(
                lambda why: UnsupportedModel(f"the files that describe them are damaged ({why})")
            ):
                return _described(checkpoint)
        except SplitnetError as error:
            return cls(refused=str(error), most=checkpoint.max_positions)

    @property
    def sentence(self) -> str:
        """A sentence about embeddings for the start of a server."""
        if self.refused:
            return f"no embeddings: {self.refused}"
        why = "as the checkpoint says" if self.told else "as the checkpoint says nothing of them"
        return f"embeddings are {_POOLING_MODES[self.mode]}{', normalised' if self.normalizes else ''}, {why}"

    def pool(self, states: Sequence[torch.Tensor], dimensions: int | None = None) -> torch.Tensor:
        """States `[positions, hidden]` of each text -> vectors `[texts, dimensions]`; None: all `hidden` dimensions."""
        if self.mode == "mean":
            rows = [text.float().mean(dim=0) for text in states]
        else:
            rows = [text[0 if self.mode == "cls" else -1].float() for text in states]
        vectors = torch.stack(rows)[:, :dimensions].cpu()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalizes else vectors


def _described(checkpoint: Checkpoint) -> Pooling:
    most = checkpoint.max_positions
    modules = _read(checkpoint, "modules.json")
    if modules is None:
        if re.search(r"^# Qwen3-Reranker", _text_of(checkpoint, "README.md") or "", re.MULTILINE):
            return Pooling(refused="the model is a reranker", most=most, reranks=True)
        number = json.loads(checkpoint.store.told_config()).get("pooling_type")  # of a GGUF file
        return Pooling(most=most) if number is None else Pooling(mode=_GGUF_MODES[number], most=most, told=True)
    folders = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if "LogitScore" in folders:
        scored = _read(checkpoint, "config.json", folders["LogitScore"])
        ids = [checkpoint.tokenizer().convert_tokens_to_ids(word) for word in ("yes", "no")]
        reranks = [scored.get("true_token_id"), scored.get("false_token_id")] == ids
        return Pooling(refused="the model is a reranker", most=most, reranks=reranks)
    pooled = _read(checkpoint, "config.json", folders["Pooling"])
    named: Any = pooled.get("pooling_mode") or [
        name.removeprefix("pooling_mode_") for name, on in pooled.items() if name.startswith("pooling_mode_") and on
    ]
    each = [named] if isinstance(named, str) else named
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in each]
    transformer = _read(checkpoint, "sentence_bert_config.json") or {}
    told = _read(checkpoint, "config_sentence_transformers.json") or {}
    prompts = {name: str(prompt) for name, prompt in (told.get("prompts") or {}).items()}
    unknown = folders.keys() - {"Transformer", "Pooling", "Normalize"} | (
        set(modes[1:]) or set(modes) - _POOLING_MODES.keys()
    )
    unknown |= {"do_lower_case"} if transformer.get("do_lower_case") else set()
    if pooled.get("include_prompt") is False and modes != ["lasttoken"] and any(prompts.values()):
        unknown.add("include_prompt")
    if unknown:
        raise UnsupportedModel(f"the checkpoint asks for {' and '.join(sorted(unknown))}, which splitnet does not know")
    longest = [each for each in (transformer.get("max_seq_length"), most) if isinstance(each, int)]
    return Pooling(
        mode=modes[0],
        normalizes="Normalize" in folders,
        prompts=prompts,
        default_prompt=told.get("default_prompt_name"),
        most=min(longest, default=None),
        told=True,
    )


def _read(checkpoint: Checkpoint, name: str, folder: str = "") -> Any:
    """The JSON of a file; None: the file does not exist. folder: the folder of a module within the checkpoint."""
    if not re.fullmatch(r"[\w-]*", folder):
        raise UnsupportedModel("modules.json of the checkpoint names files elsewhere")
    text = _text_of(checkpoint, f"{folder}/{name}" if folder else name)
    return None if text is None else json.loads(text)


def _text_of(checkpoint: Checkpoint, name: str) -> str | None:
    path = checkpoint.store.find_file(name)
    if path is None:
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_FILE_BYTES)
