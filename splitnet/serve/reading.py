"""Texts that are read and not answered: embeddings, and how well documents answer a query."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial

import torch
from starlette.requests import Request

from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ask, Pooled, Reading
from splitnet.serve.responses import ServedModel, unless_gone
from splitnet.serve.sampling import Sampling

CONTEXT = -1  # Of `truncate`: as many tokens as the model takes

# How Qwen3-Reranker is asked: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
MOST_TOKENS = 2**21  # Of all texts of a request
_SCORED_TOGETHER = 16  # Documents of which all logits are in memory


async def embed(
    served: ServedModel,
    request: Request,
    texts: Sequence[str | list[int]],
    *,
    dimensions: int | None = None,
    prompt_name: str | None = None,
    truncate: int | None = None,
) -> tuple[torch.Tensor, int]:
    """`[texts, size]` float32, and how many tokens were read.

    dimensions: how many first ones of a vector are wanted; None: all. prompt_name: of the checkpoint's prompt that is
    put before texts. truncate: tokens that are read of a longer text. Raises ApiError for what cannot be honoured.
    """
    pooling, prompts = served.pooling, served.prompts
    if pooling.refused:
        raise ApiError(400, f"{served.name!r} makes no embeddings: {pooling.refused}", param="model")
    size: int = served.generations.model.config.get_text_config().hidden_size
    if dimensions is not None and dimensions > size:
        raise ApiError(400, f"the model's embeddings have {size} dimensions: ask for fewer", param="dimensions")
    named = pooling.default_prompt if prompt_name is None else prompt_name
    if named is not None and named not in pooling.prompts:
        known = " or ".join(map(repr, pooling.prompts)) or "none"
        raise ApiError(400, f"the model has no prompt {named!r}: use {known}", param="prompt_name")
    if prompt_name is not None and any(isinstance(text, list) for text in texts):
        raise ApiError(400, "a prompt goes before text, not before tokens: leave it out", param="prompt_name")
    before = "" if named is None else pooling.prompts[named]
    most = pooling.most if truncate == CONTEXT else truncate

    def tokenized() -> list[list[int]]:
        return [prompts.of_text(before + text if isinstance(text, str) else text, "input", most) for text in texts]

    tokens = await served.preparing.run(len(await request.body()), tokenized)
    keep = 1 if pooling.mode == "lasttoken" else 0
    return await _read(served, request, tokens, keep, partial(pooling.pool, dimensions=dimensions))


async def rerank(
    served: ServedModel,
    request: Request,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None = None,
    per_document: int | None = None,
    truncate: int | None = None,
) -> tuple[list[float], int]:
    """The probability that each document answers a query, and how many tokens were read.

    instruction: what makes a document fit; None: a web search. per_document: tokens that are read of a document;
    truncate: of all that is read for one. Raises ApiError for what cannot be honoured.
    """
    if not served.pooling.reranks:
        refusal = "is no reranker that is known here: use one in the form of Qwen3-Reranker"
        raise ApiError(400, f"{served.name!r} {refusal}", param="model")
    prompts, model = served.prompts, served.generations.model
    before, behind = prompts.ids(_BEFORE), prompts.ids(_BEHIND)
    [yes], [no] = prompts.ids("yes"), prompts.ids("no")
    most = served.pooling.most if truncate == CONTEXT else truncate

    def tokenized() -> list[list[int]]:
        asked = f"<Instruct>: {instruction or _INSTRUCTION}\n<Query>: {query}\n<Document>:"
        size = len(prompts.plain(asked))
        _check_amount(size * len(documents))
        room = None if per_document is None else size + per_document
        if most is not None:
            room = min(room or most, most - len(before) - len(behind))
            if room <= size:
                raise ApiError(400, "the query leaves no room for documents: shorten it", param="query")
        return [[*before, *prompts.plain(f"{asked} {document}", room), *behind] for document in documents]

    def scored(states: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = torch.stack([text[-1] for text in states]).split(_SCORED_TOGETHER)
        logits = torch.cat([model.ends.head(part)[:, (yes, no)].float().cpu() for part in parts])
        return (logits[:, :1] - logits[:, 1:]).sigmoid()

    tokens = await served.preparing.run(len(await request.body()), tokenized)
    scores, count = await _read(served, request, tokens, 1, scored)
    return scores[:, 0].tolist(), count


def _check_amount(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise ApiError(413, f"{tokens} tokens are more than the {MOST_TOKENS} of a request: send fewer texts at once")


async def _read(
    served: ServedModel,
    request: Request,
    texts: Sequence[list[int]],
    keep: int,
    pool: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> tuple[torch.Tensor, int]:
    _check_amount(sum(map(len, texts)))
    longest, most = max(map(len, texts)), served.pooling.most
    if most is not None and longest > most:
        fix = "shorten it, or give truncate_prompt_tokens"
        too_long = f"a text of {longest} tokens is more than the {most} that the model reads: {fix}"
        raise ApiError(400, too_long, code="context_length_exceeded")
    reading = Reading([*map(len, texts)], keep, pool)
    prompt = [token for text in texts for token in text]
    ask = Ask(prompt, 0, Sampling(seed=0), reading=reading, owner=request.state.client.name)

    async def run() -> torch.Tensor:
        rows = torch.empty(0)
        async with aclosing(served.running(request.state.client, [ask], f"read-{secrets.token_hex(12)}")) as events:
            async for _, event in events:
                if isinstance(event, Pooled):
                    rows = event.rows
        return rows

    return await unless_gone(request, run()), len(prompt)
