"""Requests without an answer in text: embeddings, and scores of documents for a query."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial

import torch
from starlette.requests import Request

from splitnet.serve.answers.sampling import Sampling
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import GenerationRequest, ReadTask
from splitnet.serve.request_gate import cancel_on_disconnect
from splitnet.serve.responses import ServedModel

CONTEXT = -1  # A value of `truncate`: texts are cut to the length that the model can read
MOST_TOKENS = 2**21  # Maximum number of tokens of all texts of a request

# The prompt of Qwen3-Reranker: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_SCORED_TOGETHER = 16  # Documents whose logits are in memory at a time


async def embed(
    served: ServedModel,
    request: Request,
    texts: Sequence[str | list[int]],
    *,
    dimensions: int | None = None,
    prompt_name: str | None = None,
    truncate: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Returns embeddings `[texts, dimensions]` float32, and how many tokens were read.

    dimensions: how many first values of a vector are wanted; None: all. prompt_name: name of the checkpoint's prompt
    that is put before texts. truncate: how many first tokens of a longer text are read. Raises ApiError if the request
    cannot be honoured.
    """
    pooling, prompts = served.pooling, served.prompts
    size: int = served.generations.model.config.get_text_config().hidden_size
    named = prompt_name or pooling.default_prompt
    if pooling.refused:
        raise ApiError(400, f"{served.name!r} makes no embeddings: {pooling.refused}", param="model")
    if dimensions is not None and dimensions > size:
        raise ApiError(400, f"the model's embeddings have {size} dimensions: ask for fewer", param="dimensions")
    if named is not None and named not in pooling.prompts:
        known = " or ".join(map(repr, pooling.prompts)) or "none"
        raise ApiError(400, f"the model has no prompt {named!r}: use {known}", param="prompt_name")
    if prompt_name and any(isinstance(text, list) for text in texts):
        raise ApiError(400, "prompt_name needs text, not tokens: leave it out, or send text", param="prompt_name")
    before = pooling.prompts[named] if named else ""
    most = pooling.most if truncate == CONTEXT else truncate

    def tokenized() -> list[list[int]]:
        return [
            prompts.tokens_of_text(before + text if isinstance(text, str) else text, "input", most) for text in texts
        ]

    keep, pool = 1 if pooling.mode == "lasttoken" else 0, partial(pooling.pool, dimensions=dimensions)
    return await _read(served, request, tokenized, keep, pool)


async def rerank(
    served: ServedModel,
    request: Request,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None = None,
    per_document: int | None = None,
) -> tuple[list[float], int]:
    """Returns the probability that each document answers the query, and how many tokens were read.

    instruction: the task for which documents are judged; None: a web search. per_document: the maximum number of tokens
    that are read of a document. Raises ApiError if the request cannot be honoured.
    """
    prompts, model = served.prompts, served.generations.model
    if not served.pooling.reranks:
        refusal = "is not a reranker that splitnet knows: use one in the form of Qwen3-Reranker"
        raise ApiError(400, f"{served.name!r} {refusal}", param="model")

    def tokenized() -> list[list[int]]:
        before, behind = prompts.ids(_BEFORE), prompts.ids(_BEHIND)
        asked = f"<Instruct>: {instruction or _INSTRUCTION}\n<Query>: {query}\n<Document>:"
        size = len(prompts.plain(asked))
        _check_amount(size * len(documents))
        most = None if per_document is None else size + per_document
        return [[*before, *prompts.plain(f"{asked} {document}", most), *behind] for document in documents]

    def scored(states: Sequence[torch.Tensor]) -> torch.Tensor:
        words = [token for word in ("yes", "no") for token in prompts.ids(word)]
        parts = torch.cat([text[-1:] for text in states]).split(_SCORED_TOGETHER)
        logits = torch.cat([model.ends.head(part)[:, words].float().cpu() for part in parts])
        return (logits[:, 0] - logits[:, 1]).sigmoid()

    scores, count = await _read(served, request, tokenized, 1, scored)
    return scores.tolist(), count


def _check_amount(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise ApiError(413, f"{tokens} tokens are more than the {MOST_TOKENS} of a request: send fewer texts at once")


async def _read(
    served: ServedModel,
    request: Request,
    tokenized: Callable[[], list[list[int]]],
    keep: int,
    pool: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> tuple[torch.Tensor, int]:
    def prepared() -> tuple[list[int], list[int]]:
        texts = tokenized()
        _check_amount(sum(map(len, texts)))
        return [*map(len, texts)], [token for text in texts for token in text]

    lengths, prompt = await served.prepare(request, prepared)
    longest, most = max(lengths), served.pooling.most
    if most is not None and longest > most:
        too_long = f"a text of {longest} tokens is more than the {most} that the model reads: shorten or cut it"
        raise ApiError(400, too_long, code="context_length_exceeded")
    rows: dict[int, torch.Tensor] = {}

    def take(numbers: Sequence[int], states: Sequence[torch.Tensor]) -> None:
        rows.update(zip(numbers, pool(states), strict=True))

    ask = GenerationRequest(prompt, 0, Sampling(seed=0), reading=ReadTask(lengths, keep, take))

    async def run() -> None:
        async with aclosing(served.running(request.state.client, [ask], f"read-{secrets.token_hex(12)}")) as events:
            async for _ in events:
                pass

    await cancel_on_disconnect(request, run())
    return torch.stack([rows[number] for number in range(len(lengths))]), len(prompt)
