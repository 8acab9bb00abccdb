"""Common parts of `generate`, `chat` and `demo`: loading the client's model, streaming, and a summary of the answer."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import TextStreamer

from splitnet.checkpoint.chat_template import render
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.connection import ModelConnection
from splitnet.cli.tables import table
from splitnet.drafts.draft_stats import Counts
from splitnet.drafts.speculator import EAGLE, NAMES, OFF
from splitnet.errors import SplitnetError
from splitnet.hf.cache import ModelSession
from splitnet.hf.causal_lm import RemoteCausalLM, attached
from splitnet.hf.image_text import attached_with_images
from splitnet.hf.peft_adapters import load_adapter
from splitnet.images import Prompt, process_prompt
from splitnet.logs import printable


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None

    def options(self) -> dict[str, Any]:
        limits = {"max_new_tokens": self.max_new_tokens}
        if not self.temperature:
            return {**limits, "do_sample": False, "temperature": None, "top_p": None}
        torch.manual_seed(self.seed if self.seed is not None else random.getrandbits(63))
        return {**limits, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass
class TextGenerator:
    """A model with remote blocks, and its tokenizer."""

    model: RemoteCausalLM
    tokenizer: Any
    generator: Any  # the model itself, or its PEFT wrapper
    speculate: Any  # source of drafts, see `RemoteCausalLM.generate`
    processor: Any = None  # transformers' processor of texts and images; None: the model reads text alone here

    @classmethod
    def connect(
        cls,
        connection: ModelConnection,
        adapter: Path | None = None,
        speculate: str = OFF,
        *,
        sees_images: bool = False,
    ) -> TextGenerator:
        """Loads the client part and joins the swarm. sees_images: also loads what the model reads images with.

        Raises UnsupportedModel if the model reads no images, ModelNotFound if its processor is missing, AdapterError if
        the adapter does not fit, and the errors of `drafts_of` and `attached` if drafts from `speculate` are
        impossible.
        """
        checkpoint = connection.checkpoint()
        if sees_images:
            checkpoint = checkpoint.with_towers
        processor = checkpoint.store.processor() if sees_images else None
        drafts = drafts_of(speculate, connection)
        swarm = connection.swarm(checkpoint)
        try:
            attach = attached_with_images if sees_images else attached
            remote = attach(checkpoint, swarm, connection.options, drafts)
            generator = load_adapter(remote, adapter) if adapter else remote
            tokenizer = checkpoint.tokenizer()
            if processor is not None:
                tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
            return cls(remote, tokenizer, generator, drafts, processor)
        except BaseException:
            swarm.close()
            raise

    def encode_prompt(
        self, prompt: str, *, chat: bool | None, system: str | None = None, images: Sequence[str] = ()
    ) -> Prompt:
        """The prompt of a text. chat: None encodes a chat if the model has a chat template.

        images: see `encode_chat`.
        """
        if chat is None:
            chat = bool(self.tokenizer.chat_template)
        if not chat:
            if images:
                raise SplitnetError("images need the chat template of the model: leave out --raw")
            return Prompt(self.tokenizer(prompt).input_ids)
        system_messages = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*system_messages, {"role": "user", "content": prompt}], images)

    def encode_chat(self, messages: Sequence[dict[str, str]], images: Sequence[str] = ()) -> Prompt:
        """The prompt of a conversation, ready for the next answer. images: shown before the user's first text."""
        if not self.tokenizer.chat_template:
            raise SplitnetError("this model has no chat template: use `splitnet generate --raw`")
        from jinja2 import TemplateError

        said: list[dict[str, Any]] = [*messages]
        if images:
            said = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
            first = next(one for one in said if one["role"] == "user")
            first["content"] = [*({"type": "image"} for _ in images), *first["content"]]
        try:
            text = render(self.tokenizer, said, answer=True)
        except TemplateError as error:
            raise SplitnetError(
                f"the model's chat template refuses this ({error}): use `splitnet generate --raw`"
            ) from None
        if images:
            return process_prompt(self.processor, text, "", images)
        return Prompt(self.tokenizer(text, add_special_tokens=False).input_ids)

    def new_tokens(self, prompt: Prompt, wanted: int | None, usual: int) -> int:
        """The maximum number of tokens of an answer: `wanted`, or as many of `usual` as fit the context."""
        most = self.model.swarm.facts.max_positions
        return wanted or (usual if most is None else max(1, min(usual, most - len(prompt.tokens))))

    def print_answer(self, prompt: Prompt, sampling: SamplingOptions) -> GeneratedText:
        """Generates an answer after a prompt, and prints text as it arrives."""
        streamer = _TimedStreamer(self.tokenizer)
        began, counts = time.perf_counter(), self.model.speculator.counts
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        ids = torch.tensor([prompt.tokens])
        options = {**sampling.options(), **prompt.pixels, "pad_token_id": end if pad is None else pad}
        drafts = self.model.can_draft(ids.shape[1], sampling.max_new_tokens)
        options["speculate"] = self.speculate if drafts else OFF
        try:
            mask = torch.ones_like(ids)
            output = self.generator.generate(input_ids=ids, attention_mask=mask, streamer=streamer, **options)
        except SplitnetError:
            if streamer.first_token_at:
                streamer.end()  # prints the generated text to its last word
            raise
        new = output[0, ids.shape[1] :]
        return GeneratedText(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=ids.shape[1],
            new_tokens=len(new),
            first_token_s=streamer.first_token_at - began,
            total_s=time.perf_counter() - began,
            drafts=Counts(*(now - then for now, then in zip(self.model.speculator.counts, counts, strict=True))),
        )


def drafts_of(speculate: str, connection: ModelConnection) -> Any:
    """The value of `speculate` for `generate`: the unchanged name of a source of drafts, or a loaded model for a hub id
    or folder. Raises ModelNotFound."""
    if speculate in NAMES or speculate.startswith(EAGLE):
        return speculate
    from splitnet.blocks.backbone import load_whole

    return load_whole(Checkpoint.open(speculate), "auto").to(connection.options.device)


@dataclass(frozen=True)
class GeneratedText:
    """Generated text and how long it took."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    drafts: Counts  # counts of drafts of this answer

    @property
    def tokens_per_s(self) -> float:
        decode_s = self.total_s - self.first_token_s
        return (self.new_tokens - 1) / decode_s if decode_s > 0 else 0.0


class _TimedStreamer(TextStreamer):
    """Prints text to stdout as it arrives, and records the time of the first token."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token_at = 0.0
        self._puts = 0

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the first call passes the prompt
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # Peers can influence the text, so control characters are removed for terminals. Files and pipes get the text
        # unchanged.
        text = printable(text) if sys.stdout.isatty() else text
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def print_summary(answer: GeneratedText, session: ModelSession) -> None:
    links = [(link.sender, link.receiver, link.codec, str(link.bytes_per_token)) for link in session.links()]
    heads = ["from", "to", "codec", "bytes per token"]
    typer.echo(table(heads, links, heads[-1:], title="route"), err=True)
    typer.echo(
        f"{answer.prompt_tokens} prompt tokens, {answer.new_tokens} new; "
        f"time to first token {answer.first_token_s * 1000:.0f} ms, then {answer.tokens_per_s:.1f} tokens/s",
        err=True,
    )
    if answer.drafts.round_trips:
        typer.echo(
            f"{answer.drafts.tokens / answer.drafts.round_trips:.2f} tokens per round trip: of "
            f"{answer.drafts.drafted} drafted tokens {answer.drafts.accepted} were accepted",
            err=True,
        )
