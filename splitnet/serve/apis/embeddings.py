"""Embeddings in the form of OpenAI's API, and reranking in the form of Jina's and Cohere's."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Request
from pydantic import BeforeValidator, model_validator
from pydantic_core import to_json
from starlette.responses import Response

from splitnet.serve.apis import openai
from splitnet.serve.apis.openai_requests import Batch, TokenIds
from splitnet.serve.apis.strict import Strict, TokenCount
from splitnet.serve.gateway import Gateway
from splitnet.serve.reading import embed, rerank
from splitnet.serve.request_gate import ParsingRoute


def listed(given: Any) -> Any:
    alone = isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int))
    return [given] if alone else given


JSON = "application/json"
Inputs = Batch[str | TokenIds]
Listed = BeforeValidator(listed, json_schema_input_type=str | TokenIds | Inputs)


class EmbeddingRequest(Strict):
    """The body of `/v1/embeddings`."""

    model: str | None = None
    input: Annotated[Inputs, Listed]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: TokenCount | None = None
    prompt_name: str | None = None
    truncate_prompt_tokens: Literal[-1] | TokenCount | None = None  # -1: as many tokens as the model can read
    user: str | None = None


class TextDocument(Strict):
    text: str


class RerankRequest(Strict):
    """The body of `/v1/rerank`; text-embeddings-inference sends `texts` in place of `documents`."""

    model: str | None = None
    query: str
    documents: Batch[str | TextDocument] | None = None
    texts: Batch[str] | None = None
    top_n: TokenCount | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    instruction: str | None = None
    max_tokens_per_doc: TokenCount | None = None

    @model_validator(mode="after")
    def _one(self) -> RerankRequest:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("give one of documents and texts")
        return self


def router(gateway: Gateway) -> APIRouter:
    """The paths of the API."""
    paths = APIRouter(route_class=ParsingRoute)

    @paths.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Computes an embedding of each text."""
        served = await gateway.find_model(body.model)
        vectors, tokens = await embed(
            served,
            request,
            body.input,
            dimensions=body.dimensions,
            prompt_name=body.prompt_name,
            truncate=body.truncate_prompt_tokens,
        )
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        told = {"object": "list", "model": served.name, "usage": usage}
        coded = _base64 if body.encoding_format == "base64" else torch.Tensor.tolist
        rows = enumerate(map(coded, vectors))
        entries = ({"object": "embedding", "index": index, "embedding": row} for index, row in rows)
        work = partial(written, told, "data", entries)
        return Response(await served.prepare(request, work, vectors.nbytes), media_type=JSON)

    @paths.post("/v1/rerank", response_model=None)
    @paths.post("/v2/rerank", response_model=None)
    async def ranked(body: RerankRequest, request: Request) -> dict[str, Any] | list[dict[str, Any]]:
        """Ranks documents by how well they answer a query, the best first."""
        served = await gateway.find_model(body.model)
        documents = [each if isinstance(each, str) else each.text for each in body.documents or body.texts or ()]
        scores, tokens = await rerank(
            served,
            request,
            body.query,
            documents,
            instruction=body.instruction,
            per_document=body.max_tokens_per_doc,
        )
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        if body.texts:
            return [
                {"index": index, "score": scores[index]} | ({"text": documents[index]} if body.return_text else {})
                for index in best
            ]
        results = [{"index": index, "relevance_score": scores[index]} for index in best]
        if body.return_documents:
            results = [{**result, "document": {"text": documents[result["index"]]}} for result in results]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": f"rank-{secrets.token_hex(12)}", "model": served.name, "results": results, "usage": usage}

    return paths


API = replace(openai.API, paths=("/v1/embeddings", "/v1/rerank", "/v2/rerank"), router=router)


def _base64(row: torch.Tensor) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


def written(told: dict[str, Any], name: str, entries: Iterable[Any]) -> bytes:
    """The JSON of the object `told`, extended by a long list with the key `name`. Entries are written one by one, so
    that other threads can run in between."""
    return to_json(told)[:-1] + f',"{name}":['.encode() + b",".join(map(to_json, entries)) + b"]}"
